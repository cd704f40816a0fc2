"""Memorizing 10k, 100k and 1M tokens: speed and peak memory, windows together against one after another.

The model has random weights in the shape of the embedded one (4 layers, hidden 256, 4 heads and 2 KV heads of 64, MLP
768, window 512), in bfloat16, at ratio 32. Every case runs in processes of its own. The baseline feeds one window
at a time, as the reference implementation does (`group_windows=1`); everything else is the same code.

Counted FLOPs of a text, per layer, over all rows fed (tokens and beacons):

    matrices    2 x rows x (hidden x (heads + 2 kv_heads) x head_dim + heads x head_dim x hidden + 3 x hidden x mlp)
    attention   4 x heads x head_dim x (sum over rows of the slots before the row's window, and of its own window
                the rows up to it)

Peak memory is the growth of the process's resident set while it compresses, above what it held with the model
loaded and warm; slot bytes are keys and values of the result.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import make_parser, report, say

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCABULARY, WINDOW = 4, 256, 4, 2, 64, 768, 4096, 512
RATIO = 32
LENGTHS = {"10k": 10_000, "100k": 100_000, "1M": 1_000_000}
SECONDS_PER_CASE = 6.0  # short cases are repeated for this long, and their median taken
PROCESSES = {"10k": 3, "100k": 3, "1M": 1}  # a short case runs in so many; the least disturbed of them counts


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--lengths", nargs="+", choices=[*LENGTHS], default=[*LENGTHS])
    parser.add_argument("--case", nargs=3, metavar=("FOLDER", "TOKENS", "GROUP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        folder, tokens, group = arguments.case
        print(json.dumps(_measure(Path(folder), int(tokens), int(group))))
        return
    rows: list[dict[str, Any]] = []
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for name in arguments.lengths:
            for way, group in (("together", 0), ("one after another", 1)):
                say(f"memorizing {name} tokens, windows {way}")
                runs = [_measure_apart(folder, LENGTHS[name], group) for _ in range(PROCESSES[name])]
                case = cases[name, way] = min(runs, key=lambda run: run["seconds"])
                flops = sum(count_flops(LENGTHS[name]))
                rows.append(
                    {
                        "tokens": LENGTHS[name],
                        "windows": way,
                        "windows per pass": case["group"],
                        "seconds": case["seconds"],
                        "tokens/s": LENGTHS[name] / case["seconds"],
                        "counted TFLOP": flops / 1e12,
                        "GFLOP/s": flops / case["seconds"] / 1e9,
                        "slot MB": case["slot_bytes"] / 1e6,
                        "peak MB": case["peak_bytes"] / 1e6,
                    }
                )
    seconds = {key: case["seconds"] for key, case in cases.items()}
    ratios = {
        f"together_over_sequential_{name}": seconds[name, "one after another"] / seconds[name, "together"]
        for name in arguments.lengths
    }
    if {"10k", "1M"} <= {*arguments.lengths}:
        per_flop = {name: seconds[name, "together"] / sum(count_flops(LENGTHS[name])) for name in arguments.lengths}
        ratios |= {f"time_per_flop_{name}_over_10k": value / per_flop["10k"] for name, value in per_flop.items()}
        long, short = cases["1M", "together"], cases["10k", "together"]
        ratios["peak_bytes_over_slot_bytes_1M"] = long["peak_bytes"] / long["slot_bytes"]
        grown, slots = (long[key] - short[key] for key in ("peak_bytes", "slot_bytes"))
        ratios["peak_growth_over_slot_growth_10k_to_1M"] = grown / slots
    report("memorize", rows, ratios, arguments.json)


def count_flops(tokens: int) -> tuple[float, float]:
    """The formulas of the module's head, matrices and attention, for a text without head at `RATIO`."""
    matrices = attention = 0
    slots = 0
    for start in range(0, tokens, WINDOW):
        count = min(WINDOW, tokens - start)
        beacons = -(-count // RATIO)
        fed = count + beacons
        matrices += 2 * fed * HIDDEN * (HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * MLP)
        attention += 4 * HEADS * HEAD_DIM * (fed * slots + fed * (fed + 1) // 2)
        slots += beacons
    return float(LAYERS * matrices), float(LAYERS * attention)


def write_model(folder: Path) -> None:
    """A Qwen2-shaped checkpoint with beacon weights, random, in bfloat16."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 131072,
        "beacon_window": WINDOW,
        "beacon_ratio": [RATIO],
        "tie_word_embeddings": True,
    }
    sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.beacon_embed_tokens.weight": (1, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}"
        for prefix in ("", "beacon_"):
            for name, size in sizes.items():
                shapes[f"{layer}.self_attn.{prefix}{name}_proj.weight"] = (size, HIDDEN)
                shapes[f"{layer}.self_attn.{prefix}{name}_proj.bias"] = (size,)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_DIM)
        shapes[f"{layer}.mlp.gate_proj.weight"] = shapes[f"{layer}.mlp.up_proj.weight"] = (MLP, HIDDEN)
        shapes[f"{layer}.mlp.down_proj.weight"] = (HIDDEN, MLP)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape) * HIDDEN**-0.5
        for name, shape in shapes.items()
    }
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _measure_apart(folder: str, tokens: int, group: int) -> dict[str, Any]:
    """`_measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memorize", "--case", folder, str(tokens), str(group)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    case: dict[str, Any] = json.loads(output.splitlines()[-1])
    return case


def _measure(folder: Path, tokens: int, group: int) -> dict[str, Any]:
    """One case, in this process: seconds, and bytes of slots and of peak memory."""
    import torch

    from memory_worker.models.beacon import BeaconModel

    model = BeaconModel.from_pretrained(folder, dtype="bfloat16")
    group = group or model.group_windows
    text = torch.randint(0, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))
    model.compress(text[: 2 * WINDOW], ratio=RATIO)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts again from here
    seconds: list[float] = []
    while not seconds or sum(seconds) < SECONDS_PER_CASE:
        start = time.perf_counter()
        slots = model.compress(text, ratio=RATIO, group_windows=group)
        seconds.append(time.perf_counter() - start)
    return {
        "group": group,
        "seconds": median(seconds),
        "slot_bytes": slots.bytes,
        "peak_bytes": _resident("VmHWM") - before,
    }


def _resident(field: str) -> int:
    """Bytes of this process's resident set, at present (VmRSS) or at its peak (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


if __name__ == "__main__":
    main()
