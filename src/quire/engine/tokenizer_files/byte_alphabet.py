"""GPT-2's alphabet: one printable character for each byte."""


def _letters_of_bytes() -> dict[str, int]:
    """Printable Latin-1 bytes are their own letters; the others get U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _letters_of_bytes()
_LETTER_OF_BYTE = {byte: letter for letter, byte in BYTE_OF_LETTER.items()}


def spell(content: bytes) -> str:
    """Bytes in that alphabet."""
    return "".join(map(_LETTER_OF_BYTE.__getitem__, content))
