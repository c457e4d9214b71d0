"""TLS: the context of `--ssl-certfile`, `--ssl-keyfile` and `--ssl-ca-certs`. New files hold for new connections."""

import ssl
from pathlib import Path

from quire.errors import ConfigError
from quire.server.settings import ServerSettings


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """The context of new connections; None without a certificate. Raises `ConfigError` for files that do not fit."""
    if settings.ssl_certfile is None:
        return None
    return _RenewedCertificate(settings).context


class _RenewedCertificate:
    """Reads the files again when they have changed, at the next handshake."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._read_at = self._changed_at()
        self.context = self._load()

    def _changed_at(self) -> tuple[int, ...]:
        return tuple(path.stat().st_mtime_ns for path in self._paths() if path.exists())

    def _paths(self) -> list[Path]:
        settings = self._settings
        return [Path(name) for name in (settings.ssl_certfile, settings.ssl_keyfile, settings.ssl_ca_certs) if name]

    def _load(self) -> ssl.SSLContext:
        settings = self._settings
        assert settings.ssl_certfile is not None
        for path in self._paths():
            if not path.is_file():
                raise ConfigError(f"{path} is no file; --ssl-certfile, --ssl-keyfile and --ssl-ca-certs name PEM files")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["http/1.1"])
        try:
            # A key that is locked by a password would be asked for on the terminal.
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password=lambda: "")
        except (ssl.SSLError, OSError, ValueError) as error:
            key = "" if settings.ssl_keyfile is None else f" and ssl_keyfile {settings.ssl_keyfile}"
            raise ConfigError(
                f"ssl_certfile {settings.ssl_certfile}{key} cannot be used: "
                f"{_reason(error)}; give a certificate in PEM and its own key, without a password"
            ) from None
        if settings.ssl_ca_certs is not None:
            try:
                context.load_verify_locations(settings.ssl_ca_certs)
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(
                    f"ssl_ca_certs {settings.ssl_ca_certs} cannot be used: {_reason(error)}; give certificates in PEM"
                ) from None
        context.verify_mode = ssl.VerifyMode(settings.client_certificates)
        context.sni_callback = self._choose
        return context

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        """Give a new connection the files as they are now. Files that are half written leave the earlier ones."""
        changed_at = self._changed_at()
        if changed_at != self._read_at:
            try:
                self.context = self._load()
            except ConfigError:
                return
            self._read_at = changed_at
        connection.context = self.context


def _reason(error: Exception) -> str:
    return str(getattr(error, "reason", None) or getattr(error, "strerror", None) or error).lower().replace("_", " ")
