"""Writes docs/families.md, from runs of every configuration, and configs/models/SIZE.yaml: `make parity`."""

from __future__ import annotations

import contextlib
import io
import math
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm

from tests.models.families.measure import WAYS, case, real_widths
from tests.models.families.parity import CASES, CONFIGS, FILES
from tests.models.families.published import CONFIGS as FOLDER
from tests.models.families.published import SIZES, Size
from zoo.models.families import FAMILIES, FamilyError
from zoo.models.summary import summarize

DOCUMENT = Path(__file__).parents[3] / "docs" / "families.md"
BOUNDS = {"full": 1e-5, "padded": 1e-5, "cached": 1e-5, "chunked": 1e-5, "loss": 1e-5, "gradients": 1e-4}
MEMORY = 14 * 2**30  # of both models' weights, float32
WRONG = 1e-3  # from here on it is no rounding

# Run as it stands, its output is part of the document; formatted as ruff formats that.
REPRODUCTION = """\
import torch, transformers

torch.manual_seed(0)
config = transformers.JambaConfig(
    vocab_size=43,
    hidden_size=32,
    intermediate_size=20,
    num_hidden_layers=2,
    num_experts=1,
    num_attention_heads=4,
    num_key_value_heads=1,
    attn_layer_period=8,
    attn_layer_offset=4,
    mamba_proj_bias=True,
    mamba_dt_rank=2,
)
model = transformers.JambaForCausalLM(config).eval()
for parameter in model.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
tokens = torch.arange(3, 13)[None]
padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], 1)
mask = torch.tensor([[0] * 3 + [1] * 10])
with torch.no_grad():
    alone = model(tokens, use_cache=False).logits
    beside = model(padded, attention_mask=mask, use_cache=False).logits[:, 3:]
print(f"left-padded against alone: {(beside - alone).norm() / alone.norm():.1e}")
"""


def document(found: dict[tuple[str, int], dict[str, Any]], wide: dict[str, dict[str, Any]]) -> str:
    version = transformers.__version__
    lines = [
        "# Families",
        "",
        f"Written by `make parity` on the CPU with transformers {version} and torch {torch.__version__.split('+')[0]}; "
        "do not edit. The configurations are in tests/models/families/cases.",
        "",
        "Small configurations of every family, with unusual shapes and every weight random, read by `zoo.from_hf` and "
        "compared with transformers' own class in float32. A number is the worst relative error ||ours - theirs|| / "
        "||theirs|| of a family's configurations, rounded up to a power of ten; what is written back is equal to the "
        "last bit, in float32 and bfloat16 (tests/models/families/test_families.py, tests/hub/test_folders.py).",
        "",
        "- full: logits of a full forward pass;",
        "- padded: of a left-padded row, against transformers' full forward of that row alone;",
        "- cached, chunked: of a prompt and then a token at a time, and of a prompt in three chunks, against its full "
        "forward;",
        "- loss, gradients: the worst of any tensor; ours in float64, so that what is left is transformers' rounding.",
        "",
        _row("family", "configurations", *BOUNDS),
        _row(*["---"] * (len(BOUNDS) + 2)),
    ]
    for family, configs in CONFIGS.items():
        ours = [found[family, i]["ours"] for i in range(len(configs))]
        lines.append(_row(family, len(configs), *(_worst([each[name] for each in ours]) for name in BOUNDS)))
    lines += [
        "",
        "minimax_text_01, the released form of MiniMax, is not in transformers and has a test of its own "
        "(tests/models/families/test_minimax_text_01.py).",
        "",
        "## Real widths",
        "",
        "Layers of published sizes, one of each kind, as wide as they are; with a vocabulary of 1,000, and twice as "
        f"many experts as a token goes through. Both models together took at most {peak_memory() / 2**30:.1f} GiB.",
        "",
        _row("size", "layers", "parameters", "full", "cached"),
        _row(*["---"] * 5),
        *(
            _row(name, each["layers"], _billions(each["parameters"]), _worst([each["full"]]), _worst([each["cached"]]))
            for name, each in wide.items()
        ),
        "",
        f"## Where transformers {version} differs from itself",
        "",
        "The same ways of running, of transformers' model against its own full forward; empty is right. Ours are in "
        "the table above.",
        "",
        _row("family", "configuration", *list(WAYS)[1:]),
        _row(*["---"] * 5),
    ]
    for (family, i), errors in found.items():
        wrong = {way: error for way, error in errors["theirs"].items() if isinstance(error, str) or error > WRONG}
        if wrong:
            lines.append(_row(family, i, *(_shown(wrong.get(way)) for way in list(WAYS)[1:])))
    lines += [
        "",
        "`python -m tests.models.families.document FAMILY CONFIGURATION` prints one of them, with our figures. Such as "
        "this, with nothing of ours:",
        "",
        "```python",
        *REPRODUCTION.splitlines(),
        "```",
        "",
        f"prints `{_printed(REPRODUCTION)}`.",
        "",
        "## What else is particular",
        "",
    ]
    for family, file in FILES.items():
        lines += [f"- {family}: {note.strip()}" for note in file.get("notes", ())]
    lines += [
        "",
        "## Published sizes",
        "",
        "`zoo describe configs/models/SIZE.yaml` counts each on the meta device. Active parameters are counted as the "
        "authors seem to: all, or without the embedding, or without embedding and head.",
        "",
        _row("size", "family", "parameters", "published", "difference", "active", "counted", "published", "difference",
             "source"),
        _row(*["---"] * 10),
    ]  # fmt: skip
    lines += [size_row(size) for size in SIZES]
    return "\n".join(lines) + "\n"


def size_row(size: Size) -> str:
    """A published size's row of the table."""
    total, active, way = size.counts()
    return _row(
        size.name,
        size.family,
        _billions(total),
        _billions(size.total),
        f"{total / size.total - 1:+.1%}",
        _billions(active),
        way if size.active != size.total else "all",
        _billions(size.active),
        f"{active / size.active - 1:+.1%}",
        size.note,
    )


def problems(found: dict[tuple[str, int], dict[str, Any]], wide: dict[str, dict[str, Any]]) -> list[str]:
    """What is outside its bound."""
    failed = [f"{name}: {way} is {each[way]:.1e}" for name, each in wide.items() for way in ("full", "cached")
              if not each[way] <= BOUNDS[way]]  # fmt: skip
    return failed + [
        f"{family} {i}: {name} is {_shown(errors['ours'][name])}, must be at most {bound:.0e}"
        for (family, i), errors in found.items()
        for name, bound in BOUNDS.items()
        if name not in FILES[family].get("refused", {}).get(str(i), ())
        if isinstance(errors["ours"][name], str) or not errors["ours"][name] <= bound
    ]


def one_size_each() -> list[Size]:
    """Of each family the largest size of which one layer of each kind, twice, fits into MEMORY."""
    chosen: dict[str, tuple[int, Size]] = {}
    for size in SIZES:
        try:
            config = size.one_of_each()
            FAMILIES[size.family].config(config)
        except FamilyError:  # its layers cannot be had in so short a model
            continue
        parameters = summarize(config, 1).total.params
        if 8 * parameters <= MEMORY and parameters > chosen.get(size.family, (0, size))[0]:
            chosen[size.family] = parameters, size
    return [size for _, size in chosen.values()]


def peak_memory() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def write(path: Path, text: str) -> None:
    """Under a temporary name first."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _printed(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "reproduction", "exec"), {})
    return out.getvalue().strip()


def _worst(errors: list[float | str]) -> str:
    refused = ", or refused (below)" if any(isinstance(error, str) for error in errors) else ""
    worst = max(float(error) for error in errors if not isinstance(error, str))
    return (f"1e{math.ceil(math.log10(worst))}" if worst else "0") + refused


def _shown(error: float | str | None) -> str:
    if error is None:
        return ""
    return f"raises {error}" if isinstance(error, str) else f"{error:.1e}"


def _billions(number: float) -> str:
    return f"{number / 1e9:.4g} B" if number >= 1e9 else f"{number / 1e6:.4g} M"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    transformers.logging.set_verbosity_error()
    asked = [(sys.argv[1], int(sys.argv[2]))] if len(sys.argv) == 3 else CASES
    found = {each: case(*each) for each in tqdm(asked)}
    if len(sys.argv) == 3:
        for whose, errors in found[asked[0]].items():
            print(whose, ", ".join(f"{name} {_shown(error)}" for name, error in errors.items()))
        return 0
    wide = {size.name: real_widths(size) for size in tqdm(one_size_each())}
    for problem in problems(found, wide):
        print(problem, file=sys.stderr)
    if problems(found, wide):
        return 1
    for size in SIZES:
        write(FOLDER / f"{size.name}.yaml", size.text())
    write(DOCUMENT, document(found, wide))
    print(f"{DOCUMENT}, and {len(SIZES)} files in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
