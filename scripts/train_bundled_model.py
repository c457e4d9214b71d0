"""Train the model that ships with Quire: a small Llama that writes verse, and its byte-level BPE tokenizer.

    python scripts/train_bundled_model.py --text tinyshakespeare.txt [--out DIR] [--steps N] [--seed N] [--threads N]

The text is Shakespeare's plays as char-rnn packed them (public domain, 1.1 MB, 65 characters). The first 90 % of its
characters are for training. The last 10 % are held out; the reported loss is theirs, in nats per byte. Rows of a batch
are raw text, or the plays as conversations in which one speech answers another, so that the chat template works and an
answer ends by itself.

Everything random follows from `--seed`. Two runs with the same seed, thread count, torch build and processor are
bitwise equal; another processor or thread count adds floats in another order and ends within about 0.01 nats per byte.

The folder holds a usable model from the first evaluation on: the best one so far by held-out loss.
"""

import argparse
import json
import math
import os
import platform
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn

BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ["system", "user", "assistant"] -%}
        {{- raise_exception("This model knows the roles system, user and assistant, not " ~ message.role ~ ".") -}}
    {%- endif -%}
    {{- "<|" ~ message.role ~ "|>" ~ (message.content | trim) ~ eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|assistant|>" -}}
{%- endif -%}
"""

EXCERPT_CHARS = 12_000
"""Beginning of the held-out text. The repository keeps it so that a test can measure it."""

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a poet.",
    "Answer in verse.",
    "You are a player upon a stage, and speak as Shakespeare's people speak.",
)


@dataclass(frozen=True)
class Shape:
    """The model, with the keys of a Llama config.json."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclass(frozen=True)
class Recipe:
    """Training options. A step is `tokens_per_step` tokens, in rows of one of two lengths."""

    steps: int = 700
    tokens_per_step: int = 4096
    short_context: int = 256
    long_context: int = 1024
    long_share: float = 0.25
    """Steps with long rows: enough to train those positions; short rows are cheaper."""
    chat_share: float = 0.3
    muon_rate: float = 0.02
    adam_rate: float = 4e-3
    weight_decay: float = 0.1
    dropout: float = 0.15
    warmup_steps: int = 50
    eval_every: int = 100
    averaging: float = 0.98
    """Decay of the moving average of the weights, which is saved: it is better than the last weights."""

    def rate_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine down to a twentieth."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress))


# --- the model; modules are named so that the state dict is a Hugging Face checkpoint -------------------------------


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_size = shape.num_kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(shape.hidden_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            proj(x).view(rows, length, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        groups = self.shape.num_heads // self.shape.num_kv_heads
        k, v = _rotate(k, cos, sin).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        mixed = F.scaled_dot_product_attention(_rotate(q, cos, sin), k, v, is_causal=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))
        return out


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Decoder(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)


class Llama(nn.Module):
    """Token ids in, logits out. The output layer is the embedding table."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, dropout)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.num_layers) if residual else 0.02)

    def forward(self, ids: Tensor) -> Tensor:
        half = self.shape.head_dim // 2
        frequencies = self.shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.outer(torch.arange(ids.shape[1], dtype=torch.float32), frequencies)
        cos, sin = angles.cos(), angles.sin()
        x = self.model.dropout(self.model.embed_tokens(ids))
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


# --- the data ---------------------------------------------------------------------------------------------------


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every text round-trips, whatever its script. Special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN} $A",
                pair=f"{BEGIN} $A $B",
                special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
            ),
        ]
    )
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    return {token: token_id for token, token_id in ids.items() if token_id is not None}


class Plays:
    """Rows for training: raw text, or a conversation, from a random place."""

    def __init__(self, text: str, tokenizer: Tokenizer, seed: int) -> None:
        self._random = random.Random(seed)
        self._tokenizer = tokenizer
        self._ids = torch.tensor(self._encode(text))
        self._speeches = [block for block in text.split("\n\n") if re.match(r"[A-Z].*:\n", block)]
        self._special = special_ids(tokenizer)

    @property
    def num_tokens(self) -> int:
        return len(self._ids)

    def batch(self, recipe: Recipe) -> Tensor:
        """[rows, context + 1] token ids, every row opened by <|begin|>."""
        context = recipe.long_context if self._random.random() < recipe.long_share else recipe.short_context
        rows = [
            self._conversation(context) if self._random.random() < recipe.chat_share else self._passage(context)
            for _ in range(recipe.tokens_per_step // context)
        ]
        return torch.stack(rows)

    def _passage(self, context: int) -> Tensor:
        start = self._random.randrange(len(self._ids) - context)
        return torch.cat((torch.tensor([self._special[BEGIN]]), self._ids[start : start + context]))

    def _conversation(self, context: int) -> Tensor:
        """Speeches in the order of the play (cue, answer, cue, answer), cut to the length of a row."""
        ids = [self._special[BEGIN]]
        if self._random.random() < 0.25:
            ids += self._turn(SYSTEM, self._random.choice(SYSTEM_MESSAGES))
        at = self._random.randrange(len(self._speeches))
        while len(ids) <= context:
            cue, answer = (self._speeches[(at + i) % len(self._speeches)] for i in range(2))
            ids += self._turn(USER, self._as_typed(cue, answer))
            ids += self._turn(ASSISTANT, answer)
            at += 2
        return torch.tensor(ids[: context + 1])

    def _as_typed(self, cue: str, answer: str) -> str:
        """A cue as a user would type it: only a speaker, or words with or without a speaker."""
        style = self._random.random()
        if style < 0.2:
            return answer.partition("\n")[0]
        if style < 0.4:
            return cue
        words = cue.partition("\n")[2]
        return words.replace("\n", " ").lower() if style < 0.6 else words

    def _turn(self, role: str, content: str) -> list[int]:
        return [self._special[role], *self._encode(content), self._special[END]]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


# --- training ---------------------------------------------------------------------------------------------------


class Muon:
    """Momentum whose matrices are made orthogonal before the step (Jordan et al. 2024), for the layers' weights.

    Known to need fewer steps than AdamW. Float32 throughout: torch.optim.Muon rounds to bfloat16, for which many CPUs
    have no fast product.
    """

    MOMENTUM = 0.95
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, weights: list[nn.Parameter], weight_decay: float) -> None:
        self._weights = weights
        self._momenta = [torch.zeros_like(weight) for weight in weights]
        self._weight_decay = weight_decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for weight, momentum in zip(self._weights, self._momenta, strict=True):
            assert weight.grad is not None
            momentum.lerp_(weight.grad, 1 - self.MOMENTUM)
            update = self._orthogonal(weight.grad.lerp(momentum, self.MOMENTUM))
            rows, columns = weight.shape
            weight.mul_(1 - rate * self._weight_decay)
            weight.add_(update, alpha=-rate * max(1.0, rows / columns) ** 0.5)
            weight.grad = None

    def _orthogonal(self, matrix: Tensor) -> Tensor:
        """Newton-Schulz iteration: all singular values move towards 1."""
        a, b, c = self.COEFFICIENTS
        x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            square = x @ x.T
            x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
        return x.T if matrix.shape[0] > matrix.shape[1] else x


class MovingAverage:
    """Weights averaged over the last steps; the window grows until it is 1 / (1 − decay) steps wide."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._steps = 0
        self._source = model
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    def update(self) -> None:
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 9))
        for name, weight in self._source.state_dict().items():
            self.weights[name].lerp_(weight, 1 - decay)


@torch.no_grad()
def held_out_loss(model: Llama, tokenizer: Tokenizer, text: str, context: int) -> float:
    """Nats per byte over consecutive rows of `context` tokens, each opened by <|begin|>; every token counts once."""
    model.eval()
    ids = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    begin = torch.tensor([special_ids(tokenizer)[BEGIN]])
    total = 0.0
    for row in ids.split(context):
        logits = model(torch.cat((begin, row[:-1]))[None])[0]
        total += F.cross_entropy(logits, row, reduction="sum").item()
    return total / len(text.encode())


def train(model: Llama, plays: Plays, recipe: Recipe) -> Iterator[tuple[int, float, dict[str, Tensor]]]:
    """Yields (steps done, training loss per token, averaged weights) at every evaluation point."""
    matrices = [weight for name, weight in model.named_parameters() if name.endswith("proj.weight")]
    others = [weight for name, weight in model.named_parameters() if not name.endswith("proj.weight")]
    muon = Muon(matrices, recipe.weight_decay)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)
    average = MovingAverage(model, recipe.averaging)
    running = 0.0
    for step in range(recipe.steps):
        rows = plays.batch(recipe)
        logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(recipe.muon_rate * recipe.rate_at(step))
        adam.param_groups[0]["lr"] = recipe.adam_rate * recipe.rate_at(step)
        adam.step()
        adam.zero_grad()
        average.update()
        running += loss.item()
        if (step + 1) % recipe.eval_every == 0 or step + 1 == recipe.steps:
            yield step + 1, running / ((step % recipe.eval_every) + 1), average.weights
            running = 0.0


# --- the folder ---------------------------------------------------------------------------------------------------


def write_folder(folder: Path, shape: Shape, recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    special = special_ids(tokenizer)
    begin, end = special[BEGIN], special[END]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": recipe.long_context,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": None,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
        "use_cache": True,
    }
    generation = {
        "bos_token_id": begin,
        "eos_token_id": [end],
        "do_sample": True,
        "temperature": 0.8,
        "top_p": 0.95,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "bos_token": BEGIN,
        "eos_token": END,
        "model_max_length": recipe.long_context,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token, token_id in special.items()
        },
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_weights(folder: Path, weights: dict[str, Tensor]) -> None:
    """Save in 16 bits, through a second file, so that an interrupted run keeps the former file."""
    rounded = {name: weight.to(torch.float16).contiguous() for name, weight in weights.items()}
    unfinished = folder / "model.safetensors.part"
    save_file(rounded, unfinished, metadata={"format": "pt"})
    unfinished.chmod(0o644)  # save_file makes the file readable by its owner only
    unfinished.replace(folder / "model.safetensors")


@torch.no_grad()
def generate(model: Llama, ids: list[int], num_tokens: int, end: int, temperature: float, seed: int) -> list[int]:
    """Sample without a KV cache, to show what the model learned."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    ids = list(ids)
    for _ in range(num_tokens):
        probabilities = torch.softmax(model(torch.tensor([ids]))[0, -1] / temperature, -1)
        ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if ids[-1] == end:
            break
    return ids


def samples(model: Llama, tokenizer: Tokenizer) -> str:
    """One passage and two answers, as Markdown."""
    special = special_ids(tokenizer)
    parts = []
    for cue in (None, "What is love?", "ROMEO:"):
        if cue is None:
            prompt = tokenizer.encode("KING RICHARD II:\n").ids
        else:
            words = tokenizer.encode(cue, add_special_tokens=False).ids
            prompt = [special[BEGIN], special[USER], *words, special[END], special[ASSISTANT]]
        ids = generate(model, prompt, 160, special[END], 0.7, seed=1)
        heading = "Continuing `KING RICHARD II:`" if cue is None else f"Answering `{cue}` through the chat template"
        text = tokenizer.decode(ids[0 if cue is None else len(prompt) :]).strip()
        parts.append(f"{heading}\n\n```\n{text}\n```\n")
    return "\n".join(parts)


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(model: Llama, tokenizer: Tokenizer, recipe: Recipe, held_out: str) -> dict[str, float]:
    """Text → loss in nats per byte."""
    contexts = (recipe.short_context, 512, recipe.long_context, 2 * recipe.long_context)
    parts = {f"rows of {context} tokens": (held_out, context) for context in contexts}
    parts[f"of its first {EXCERPT_CHARS:,} characters"] = (held_out[:EXCERPT_CHARS], recipe.long_context)
    return {name: held_out_loss(model, tokenizer, text, context) for name, (text, context) in parts.items()}


def training_page(
    folder: Path,
    shape: Shape,
    recipe: Recipe,
    options: argparse.Namespace,
    held_out: str,
    log: list[str],
    seconds: float,
) -> str:
    """Write TRAINING.md from the saved weights."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    model = Llama(shape, dropout=0.0)
    model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
    losses = measure(model, tokenizer, recipe, held_out)
    nats = losses[f"rows of {recipe.long_context} tokens"]
    bits = nats / math.log(2)
    excerpt = f"of its first {EXCERPT_CHARS:,} characters"
    command = f"--steps {recipe.steps} --seed {options.seed} --threads {options.threads}"
    rows = {
        "held-out loss": f"{nats:.4f} nats per byte ({bits:.4f} bits), rows of {recipe.long_context} tokens",
        excerpt: f"{losses[excerpt]:.4f} nats per byte",
        "held out": f"{len(held_out.encode()):,} bytes, the last 10 % of tinyshakespeare.txt (public domain)",
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}, stored in float16",
        "time": f"{seconds:.0f} s",
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {options.threads} threads",
        "versions": f"torch {torch.__version__}, Python {platform.python_version()}",
        "command": f"`python scripts/train_bundled_model.py --text tinyshakespeare.txt {command}`",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    by_context = "\n".join(f"{name}: {loss:.4f} nats per byte" for name, loss in losses.items())
    return (
        "# How the bundled model was trained\n\n"
        "Written by `scripts/train_bundled_model.py`.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        "## What the training printed\n\n```\n" + "\n".join(log) + "\n```\n\n"
        f"The saved weights on the held-out text:\n\n```\n{by_context}\n```\n\n"
        f"## What the model writes\n\n{samples(model, tokenizer)}"
    )


def main() -> None:
    shape, recipe = Shape(), Recipe()
    parser = argparse.ArgumentParser(description="Train the model that ships with Quire.")
    parser.add_argument("--text", type=Path, required=True, help="tinyshakespeare.txt, or plain text in its form")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "src" / "quire" / "bundled")
    parser.add_argument("--steps", type=int, default=recipe.steps)
    parser.add_argument("--seed", type=int, default=1623)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    recipe = replace(recipe, steps=options.steps)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    log: list[str] = []

    def report(line: str) -> None:
        log.append(line)
        print(line, flush=True)

    text = options.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    tokenizer = train_tokenizer(text[:cut], shape.vocab_size)
    plays = Plays(text[:cut], tokenizer, options.seed)
    model, averaged = Llama(shape, recipe.dropout), Llama(shape, dropout=0.0)
    write_folder(options.out, shape, recipe, tokenizer)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    report(f"{num_parameters:,} parameters, {plays.num_tokens:,} tokens of text, {len(text) - cut:,} bytes held out")
    best = math.inf
    for step, loss, weights in train(model, plays, recipe):
        averaged.load_state_dict(weights)
        nats = held_out_loss(averaged, tokenizer, text[cut:], recipe.long_context)
        seconds = time.monotonic() - started
        report(f"step {step:5}  training {loss:.3f} nats/token  held out {nats:.4f} nats/byte  {seconds:6.0f} s")
        if nats < best:
            best = nats
            write_weights(options.out, weights)
    seconds = time.monotonic() - started
    page = training_page(options.out, shape, recipe, options, text[cut:], log, seconds)
    (options.out / "TRAINING.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
