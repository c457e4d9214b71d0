"""ServerSettings: the options of the HTTP server. Its fields are flags of `quire serve`, besides EngineConfig's."""

import ipaddress
import re
from dataclasses import dataclass, field

import msgspec

from quire.errors import ConfigError
from quire.option_values import parse_size
from quire.server.api_keys import ApiKey, plain_keys, read_key_lines, read_keys
from quire.server.tools.detect import check_parser_names

LOG_FORMATS = ("text", "json")
_ADDRESS = re.compile(r"\[[0-9a-fA-F:.]+\]")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)*", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Options of one server. Raises `ConfigError` for a value out of range and for a public address without a key."""

    host: str = "127.0.0.1"
    """Address to listen on. An address other than loopback needs an API key."""
    port: int = 8000
    """Port to listen on. 0 takes a free port."""
    uds: str | None = None
    """Listen on a Unix socket at this path instead of host and port. Its owner and group may connect."""
    ssl_certfile: str | None = None
    """Serve https with this certificate (PEM, with its chain). A file that is renewed holds for new connections."""
    ssl_keyfile: str | None = None
    """The certificate's key (PEM). Default: it is in `ssl_certfile`."""
    ssl_ca_certs: str | None = None
    """Let only clients connect whose certificate one of these signed (PEM)."""
    ssl_cert_reqs: int | None = None
    """Certificates of clients: 0 asks for none, 1 checks one that is sent, 2 needs one. Default: 2 with `ssl_ca_certs`,
    else 0."""
    api_key: tuple[str, ...] = ()
    """Accept only requests with this key (`Authorization: Bearer KEY`); only /health needs none. Also read
    from QUIRE_API_KEY. Repeat for several."""
    api_key_file: str | None = None
    """File with further API keys, one per line. Empty lines and lines that begin with # are skipped."""
    api_keys: str | None = None
    """TOML file with further keys: their names, limits, priorities and models."""
    allow_unauthenticated: bool = False
    """Listen on a public address without an API key."""
    share_prefix_cache: bool = False
    """Let requests of different API keys share prefix blocks. Clients could then time each other's prompts."""
    prefix_file: str | None = None
    """Prefixes to compute at start and keep in the KV cache, for all API keys. JSON lines, each with a `prompt`,
    `prompt_token_ids` or `messages`."""
    allow_origins: tuple[str, ...] = ()
    """Further origin of web pages that may call the server from a browser (CORS), besides pages of this machine and
    desktop programs. * allows all. Repeat for several."""
    allowed_hosts: tuple[str, ...] = ()
    """Further name by which clients call the server (the Host header), besides localhost, `host` and addresses. Without
    API keys other names get 403. * allows all. Repeat for several."""
    allowed_media_domains: tuple[str, ...] = ()
    """Domain from which images are fetched that a request names by an http or https URL, if its addresses are public.
    Without any, images come as data URLs only. Repeat for several."""
    embedding_model: str | None = None
    """A second model, for embeddings, scores and classes, beside one that generates: a folder or name as for the first.
    It has a process and a pool of its own, and half of the threads."""
    embedding_options: str | None = None
    """Options of its engine as a JSON object, e.g. {"quantization": "int8", "threads": 1}."""
    tool_call_parser: str = "auto"
    """How the model writes tool calls: a name from the table of formats, vLLM's names among them. auto finds it from
    the chat template, none reads plain JSON."""
    reasoning_parser: str = "auto"
    """How the model marks its reasoning: a name as vLLM has it. auto finds it from the chat template, none leaves the
    reasoning in the text."""
    enable_auto_tool_choice: bool = False
    """Has no effect, because tool calls need no option; for command lines that are written for vLLM."""
    allow_runtime_lora: bool = False
    """Let clients load and unload adapters by /v1/load_lora_adapter, from any folder that the server can read. Also
    read from VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
    max_body_size: int = 8 * 2**20
    """Maximum bytes of a request body, e.g. 8MiB. A larger body is answered with 413."""
    max_header_size: int = 32 * 2**10
    """Maximum bytes of request line and headers. Larger headers are answered with 431."""
    max_prompt_chars: int = 4_000_000
    """Maximum characters in the prompts of one request."""
    max_samples: int = 1024
    """Maximum samples of one request: prompts × n."""
    batch_dir: str | None = None
    """Folder that keeps uploaded files, batches and their answers; /v1/files and /v1/batches need it."""
    batch_dir_size: int = 10 * 2**30
    """Maximum bytes of all files there, e.g. 10GiB."""
    batch_concurrency: int = 64
    """Requests of batches in the engine at once."""
    max_file_size: int = 200 * 2**20
    """Maximum bytes of an uploaded file. A larger one is answered with 413."""
    responses_store: str | None = None
    """SQLite file that keeps responses of /v1/responses, which later ones may continue. Default: in memory, until the
    server ends."""
    responses_store_size: int = 64 * 2**20
    """Maximum bytes of kept responses, e.g. 64MiB. The oldest are removed when it is reached."""
    stall_timeout: float = 30.0
    """Disconnect a client that does not read its stream, or does not send its body, for this many seconds. 0: never."""
    request_timeout: float = 0.0
    """Seconds after which a request ends with an error (408). A client may set less with the header
    x-request-timeout. 0: never."""
    shutdown_timeout: float = 30.0
    """Seconds for running requests to finish after SIGTERM. A second signal stops at once."""
    access_log: bool = False
    """Log one line per request, apart from those of /health. Prompts and answers are never logged."""
    log_format: str = "text"
    """Form of the lines on standard error: text, or json."""
    otlp_traces_endpoint: str | None = None
    """Send a span of each answer to this OpenTelemetry collector (OTLP over HTTP), e.g. http://127.0.0.1:4318. Needs
    quire-llm[otel]; the variables of OpenTelemetry (OTEL_…) hold."""
    root_path: str = ""
    """Path under which a proxy offers the server, e.g. /llm. It is optional in requests: a proxy may strip it."""
    keys: tuple[ApiKey, ...] = field(init=False, default=(), repr=False)
    """All keys: those of `api_key`, and of the files `api_key_file` and `api_keys`."""

    def __post_init__(self) -> None:
        for name in ("api_key", "allow_origins", "allowed_hosts", "allowed_media_domains"):
            value = getattr(self, name)
            texts = (value,) if isinstance(value, str) else tuple(value)
            object.__setattr__(self, name, tuple(one for text in texts for one in _as_texts(name, text)))
        for name in ("max_body_size", "max_header_size", "batch_dir_size", "max_file_size", "responses_store_size"):
            object.__setattr__(self, name, parse_size(name, getattr(self, name)))
        for name, low, high in (
            ("port", 0, 65535),
            ("max_header_size", 1024, 2**24),
            ("max_prompt_chars", 1, 2**31),
            ("max_samples", 1, 2**20),
            ("batch_concurrency", 1, 2**16),
        ):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        for name in ("stall_timeout", "request_timeout", "shutdown_timeout"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more seconds")
        if self.log_format not in LOG_FORMATS:
            raise ConfigError(f"log_format is {self.log_format!r}; it must be {' or '.join(LOG_FORMATS)}")
        object.__setattr__(self, "root_path", self.root_path.rstrip("/"))
        if not _ROOT_PATH.fullmatch(self.root_path):
            raise ConfigError(f"root_path is {self.root_path!r}; give a path such as /llm")
        check_parser_names(self.tool_call_parser, self.reasoning_parser)
        if any(not key.strip() for key in self.api_key):
            raise ConfigError("api_key is empty; give a key, or leave the option out")
        object.__setattr__(self, "keys", self._read_keys())
        if self.uds == "":
            raise ConfigError("uds is empty; give the path of a socket, or leave it out")
        if self.uds is None:
            self.check_exposure(self.host)
        self._check_tls()
        self._check_endpoint()

    @property
    def client_certificates(self) -> int:
        """Whether clients need a certificate, as a number of `ssl.VerifyMode`."""
        if self.ssl_cert_reqs is None:
            return 0 if self.ssl_ca_certs is None else 2
        return self.ssl_cert_reqs

    def check_exposure(self, host: str) -> None:
        """Raise `ConfigError` if others can reach the address `host` and there is no API key."""
        if not (self.keys or self.allow_unauthenticated or is_loopback(host)):
            raise ConfigError(
                f"host is {host}, which others can reach, and there is no API key; set --api-key or "
                "QUIRE_API_KEY or --api-key-file or --api-keys, listen on 127.0.0.1, or accept it with "
                "--allow-unauthenticated"
            )

    def _check_tls(self) -> None:
        if self.ssl_certfile is None:
            for name in ("ssl_keyfile", "ssl_ca_certs", "ssl_cert_reqs"):
                if getattr(self, name):
                    raise ConfigError(f"{name} is set without ssl_certfile; give the server's certificate too")
        if self.client_certificates not in (0, 1, 2):
            raise ConfigError(f"ssl_cert_reqs is {self.ssl_cert_reqs}; it must be 0, 1 or 2")
        if self.client_certificates and self.ssl_ca_certs is None:
            raise ConfigError(
                f"ssl_cert_reqs is {self.ssl_cert_reqs} without ssl_ca_certs; give the signers' certificates"
            )

    def _check_endpoint(self) -> None:
        if self.otlp_traces_endpoint is None:
            return
        scheme, _, rest = self.otlp_traces_endpoint.partition("://")
        if scheme not in ("http", "https") or not rest:
            raise ConfigError(
                f"otlp_traces_endpoint is {self.otlp_traces_endpoint!r}; give the collector's address for OTLP over "
                "HTTP, such as http://127.0.0.1:4318 (gRPC is not supported; collectors take HTTP on port 4318)"
            )

    def _read_keys(self) -> tuple[ApiKey, ...]:
        lines = read_key_lines(self.api_key_file) if self.api_key_file is not None else ()
        plain = plain_keys((*self.api_key, *lines))
        read = read_keys(self.api_keys) if self.api_keys is not None else ()
        for key in read:
            if any(key.digest == other.digest for other in plain):
                raise ConfigError(f"api_keys {self.api_keys}: the key of {key.name!r} is also one of api_key")
        return plain + read


def _as_texts(name: str, text: str) -> list[str]:
    """One text, or the texts of a JSON list, as vLLM's command lines give them. Raises `ConfigError`."""
    if name == "api_key" or not text.startswith("["):
        return [text]
    try:
        return msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError as error:
        if _ADDRESS.fullmatch(text):
            return [text]
        raise ConfigError(f'{name} is {text!r}; give one value, or a JSON list such as ["a", "b"]: {error}') from None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
