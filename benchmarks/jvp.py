"""`jetplane.jvp` beside `torch.func.jvp` on models of transformers: ``python -m benchmarks.jvp --out FILE.json``.

Small models from random configurations, with torch's scaled dot-product attention (sdpa) where they have it. Each is
differentiated in all of its parameters along one random direction. Derivatives are held against reverse mode twice in
double precision; times are the processor's, in single precision, as multiples of a plain forward pass. ``--table FILE``
prints the table of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import jetplane as jp

from .measuring import machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VOCABULARY, TOKENS = 100, 64
TOLERANCE = 1e-4  # relative; some models compute parts in single precision by themselves
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GROUPED = SIZES | dict(num_key_value_heads=2)


@dataclass(frozen=True)
class Architecture:
    """A model class, its configuration and what it is called with."""

    model: str
    config: str
    options: dict[str, Any]
    inputs: str = "tokens"


ARCHITECTURES = {
    "GPT-2": Architecture("GPT2LMHeadModel", "GPT2Config", dict(
        vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2,
    )),
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "Mistral": Architecture("MistralForCausalLM", "MistralConfig", GROUPED | dict(sliding_window=16)),
    "Qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "Gemma": Architecture("GemmaForCausalLM", "GemmaConfig", GROUPED | dict(head_dim=16)),
    "OPT": Architecture("OPTForCausalLM", "OPTConfig", dict(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
        max_position_embeddings=128, word_embed_proj_dim=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )),
    "T5": Architecture("T5ForConditionalGeneration", "T5Config", dict(
        vocab_size=VOCABULARY, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=0,
    ), "pairs"),
    "BERT": Architecture("BertForMaskedLM", "BertConfig", SIZES),
    "DistilBERT": Architecture("DistilBertForMaskedLM", "DistilBertConfig", dict(
        vocab_size=VOCABULARY, dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=128,
    )),
    "Whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", dict(
        vocab_size=VOCABULARY, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=8, max_source_positions=32,
        max_target_positions=128, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        suppress_tokens=None, begin_suppress_tokens=None,
    ), "sound"),
    "ViT": Architecture("ViTForImageClassification", "ViTConfig", dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=4,
    ), "images"),
    "ConvNeXt": Architecture("ConvNextForImageClassification", "ConvNextConfig", dict(
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2,
    ), "images"),
}  # fmt: skip


def create(name: str) -> nn.Module:
    """A model away from its initial zeros, without dropout."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    of = ARCHITECTURES[name]
    config = getattr(transformers, of.config)(**of.options)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    kind = getattr(transformers, of.model)
    try:
        model = kind._from_config(config, attn_implementation="sdpa")
    except (ValueError, ImportError):
        model = kind._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def batch(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a model is called with."""
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCABULARY, (4, TOKENS))
    kind = ARCHITECTURES[name].inputs
    if kind == "images":
        return {"pixel_values": torch.randn(4, 3, 32, 32).to(dtype)}
    if kind == "sound":
        return {"input_features": torch.randn(4, 8, 64).to(dtype), "decoder_input_ids": tokens}
    return {"input_ids": tokens} | ({"decoder_input_ids": tokens} if kind == "pairs" else {})


Way = Callable[[Callable[..., Tensor], tuple[Any, ...], tuple[Any, ...]], Any]


def by_formula(f: Callable[..., Tensor], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    """`torch.func.jvp` where attention is told to use its formula, which has a forward derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(f, primals, tangents)


WAYS: dict[str, Way] = {
    "jetplane.jvp": jp.jvp,
    "torch.func.jvp": torch.func.jvp,
    "torch.func.jvp, MATH": by_formula,
}


def setting(name: str, dtype: torch.dtype) -> tuple[Callable[..., Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """A model's logits as a function of its parameters, these, and a direction."""
    model, inputs = create(name).to(dtype), batch(name, dtype)
    f, params = jp.functional(model)
    params = {n: p.detach() for n, p in params.items()}
    torch.manual_seed(2)
    tangents = {n: torch.randn_like(p) for n, p in params.items()}
    return lambda p: f(p, **inputs).logits, params, tangents


def twice_reverse(f: Callable[..., Tensor], params: dict[str, Tensor], v: dict[str, Tensor]) -> Tensor:
    """``J v`` as the derivative of ``u -> (Jᵀ u) . v``, which is linear: reverse mode twice, by attention's formula."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        moving = {n: p.detach().requires_grad_() for n, p in params.items()}
        y = f(moving)
        u = torch.zeros_like(y, requires_grad=True)
        found = torch.autograd.grad(y, list(moving.values()), u, create_graph=True, allow_unused=True)
        along = sum((g * v[n]).sum() for n, g in zip(moving, found, strict=True) if g is not None)
        return torch.autograd.grad(along, u)[0]  # type: ignore[arg-type]


def measured(name: str, repeats: int) -> dict[str, Any]:
    """What each way does with one model: whether it passes, the deviation and the time."""
    row: dict[str, Any] = {"architecture": name}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f, params, v = setting(name, torch.float64)
        want = twice_reverse(f, params, v)
        g, single, w = setting(name, torch.float32)
        passing = {}
        for way, jvp in WAYS.items():
            try:
                got = jvp(f, (params,), (v,))[1]
                deviation = ((got - want).norm() / want.norm()).item()
                row[way] = {"status": "passes" if deviation < TOLERANCE else "wrong", "deviation": deviation}
                passing[way] = jvp
            except Exception as error:
                row[way] = {"status": "raises", "error": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
        times: dict[str, list[float]] = {}
        for _ in range(repeats + 1):
            runs: dict[str, Callable[[], Any]] = {"forward": lambda: g(single)}
            runs |= {way: lambda jvp=jvp: jvp(g, (single,), (w,)) for way, jvp in passing.items()}
            for way, run in runs.items():
                start = time.process_time()
                run()
                times.setdefault(way, []).append(time.process_time() - start)
    medians = {way: statistics.median(found[1:]) for way, found in times.items()}
    row["forward_ms"] = 1000 * medians["forward"]
    for way in passing:
        row[way]["time"] = medians[way] / medians["forward"]
    return row


def table(results: dict[str, Any]) -> str:
    """The results as a table of Markdown."""
    ways = list(WAYS)
    lines = [
        results["machine"] + f", transformers {results['transformers']}",
        "",
        "| model | " + " | ".join(f"`{way}` | deviation | time" for way in ways) + " |",
        "|---|" + "---|--:|--:|" * len(ways),
    ]
    for row in results["rows"]:
        cells = []
        for way in ways:
            found = row[way]
            timed = f"{found['time']:.1f}" if "time" in found else ""
            deviation = f"{found['deviation']:.0e}" if "deviation" in found else found["error"].split(":")[0]
            cells += [found["status"], deviation, timed]
        lines.append(f"| {row['architecture']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.jvp", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=list(ARCHITECTURES), default=list(ARCHITECTURES))
    add("--repeats", type=int, default=7)
    add("--out", type=Path, help="write the results here, as JSON")
    add("--table", type=Path, help="print the table of this file and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    try:
        import transformers
    except ImportError as error:
        raise SystemExit("the models are those of transformers: pip install 'jetplane[frameworks]'") from error
    torch.set_num_threads(1)
    results: dict[str, Any] = {
        "command": "python -m benchmarks.jvp",
        "machine": machine(1),
        "transformers": transformers.__version__,
        "rows": [measured(name, args.repeats) for name in args.models],
    }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
