"""README.md of an exported model: what it is, from the recipe, and how well it does, from RUN/eval.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..errors import SodaError
from ..evaluation.suite import Suite
from ..files import write_text
from ..log import log
from ..model.size import size_of
from ..registry import SUITES
from ..vocab import TokenSpace

CARD = "README.md"
BEGIN, END = "<!-- evaluation: soda evaluate writes between these lines -->", "<!-- end of evaluation -->"


def model_card(recipe: Recipe, space: TokenSpace, saved: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """saved: checkpoint.json. results: what RUN/eval.json holds of this model; may be empty."""
    size, m = size_of(recipe.model, space, recipe.data.sequence_length), recipe.model
    trained = int(saved.get("tokens", 0))
    tied = "one table for input and output" if m.tie_embeddings else "separate input and output tables"
    lines = [
        *_front_matter(recipe, saved),
        f"# {recipe.name}",
        "",
        "A native discrete audio model: one decoder-only transformer that predicts the next token over text, semantic "
        "and acoustic tokens, so that recognition, synthesis and continuation of speech are all prompts. It is a stock "
        "`Qwen3ForCausalLM`, exported by megatron_soda, which implements the SODA paper (arXiv 2602.16687).",
        "",
        "## Model",
        "| | |",
        "|---|---|",
        f"| parameters | {size.total:,}, of which {size.blocks:,} in the layers; {tied} |",
        f"| layers, width, feed-forward | {m.num_layers}, {m.hidden_size}, {m.ffn_hidden_size} |",
        f"| heads, key-value heads, head size | {m.num_attention_heads}, {m.num_query_groups}, {m.head_dim} |",
        f"| context | {recipe.data.sequence_length:,} tokens |",
        f"| checkpoint | step {saved['step']:,}" + (f", {trained:,} tokens" if trained else "") + " |",
        "",
        *_vocabulary(space),
        *_use(space),
        *_training(recipe, saved),
        BEGIN,
        *_evaluation(results),
        END,
        "",
    ]
    return "\n".join(lines)


def update_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Puts the results into the card of an exported folder, between its two marked lines. A card without them is left
    alone: somebody has written their own."""
    path = folder / CARD
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    made = "\n".join([before + begin, *_evaluation(results), end + after])
    if not (begin and end) or made == text:
        return
    try:
        write_text(path, made)
        path.chmod(0o644)
    except (OSError, SodaError) as error:  # a folder of somebody else's, or a full disk; the results are in eval.json
        log.warning(f"{path}: the results could not be added ({error})")


def _prepared_here(recipe: Recipe, saved: Mapping[str, Any]) -> bool:
    """Whether the recipe says what the data were made of: those of other folders were prepared by other recipes."""
    return not (recipe.data.path or recipe.data.corpora or saved.get("weights_only"))


def _front_matter(recipe: Recipe, saved: Mapping[str, Any]) -> list[str]:
    free = _prepared_here(recipe, saved) and recipe.prepare.speech == "asterisk"
    named = ["language:", *(f"- {json.dumps(one)}" for one in recipe.prepare.languages)] if free else []
    return ["---", "library_name: transformers", "tags:", "- audio", "- speech", *named, "---"]


def _vocabulary(space: TokenSpace) -> list[str]:
    ends = f"`<\\|begin_of_text\\|>` is {space.bos}, `<\\|end_of_text\\|>` {space.eos}"
    return [
        "## Tokens",
        f"{space.size:,} ids. A document is `<|begin_of_text|>`, then either bare text or spans of text and of sound, "
        "then `<|end_of_text|>`. A frame of sound is one code from each codebook, in order; in strings, code c of "
        f"codebook k is the character U+E000 + {space.entries:,} k + c.",
        "",
        "| ids | |",
        "|---|---|",
        f"| 0 to {space.text_size - 1} | text; {ends} |",
        f"| {space.text_start}, {space.text_end} | `<\\|text_start\\|>`, `<\\|text_end\\|>` |",
        f"| {space.audio_start}, {space.audio_end} | `<\\|audio_start\\|>`, `<\\|audio_end\\|>` |",
        f"| {space.audio_base} to {space.size - 1} | {space.codebooks} codebooks of {space.entries:,} codes |",
        "",
    ]


def _use(space: TokenSpace) -> list[str]:
    return [
        "## Use",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "."  # this one',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        'model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")',
        'prompt = tokenizer("<|text_start|>good morning<|text_end|><|audio_start|>", return_tensors="pt")',
        "ids = model.generate(**prompt, max_new_tokens=800, do_sample=True, temperature=0.9, top_p=0.95)[0].tolist()",
        f"codes = [(i - {space.audio_base}) % {space.entries} for i in ids if i >= {space.audio_base}]",
        f"frames = [codes[i : i + {space.codebooks}] for i in range(0, len(codes), {space.codebooks})]",
        "```",
        "Generation stops at the end of a span of text or sound and at the end of the document "
        "(`generation_config.json`). The codec that turns frames into sound is described in `codec/`, if there is one. "
        "`soda generate FOLDER`, of megatron_soda, also enforces the order of the codebooks.",
        "",
    ]


def _head_rows(recipe: Recipe) -> list[str]:
    """What a decoder that knows no grammar has to expect."""
    t = recipe.training
    if t.head_rows == "all":
        return []
    others = "no others" if not t.head_other_share else f"a sample of {t.head_other_share:.1%} of the others"
    return [
        "In training, the tokens that the grammar of documents allows at a position competed with one another and with "
        f"{others} (`training.head_rows`, `training.head_other_share`): decode within the grammar, as `soda generate` "
        "does. Free sampling may give illegal tokens.",
        "",
    ]


def _training(recipe: Recipe, saved: Mapping[str, Any]) -> list[str]:
    t, o = recipe.training, recipe.optimizer
    if saved.get("weights_only"):
        of = saved.get("imported", {}).get("name", "another model")
        return ["## Training", f"None here: the weights are those of {of}.", ""]
    data, consumed = saved.get("data", {}).get("corpora", {}), saved.get("consumed", {})
    lines = [
        "## Training",
        f"{saved['step']:,} steps of {t.global_batch_size:,} windows of {recipe.data.sequence_length:,} tokens; "
        f"{o.name}, peak rate {o.learning_rate:g}, betas {o.beta1:g} and {o.beta2:g}, weight decay {o.weight_decay:g}; "
        f"schedule {recipe.schedule.name} over {t.steps:,} steps; {recipe.precision.dtype}. All settings are in "
        "`recipe.yaml`.",
        "",
        *_head_rows(recipe),
    ]
    if (init := saved.get("init") or {}).get("origin"):
        lines += [f"Training started with the weights of {init.get('name') or 'an earlier model'}.", ""]
    if _prepared_here(recipe, saved):
        p = recipe.prepare
        speech, text = Path(p.speech).name, ", ".join(Path(one).name for one in p.text)  # no paths of this machine
        made_of = [f"speech `{speech}`"] * bool(speech) + [f"text `{text}`"] * bool(text)
        made_of += [f"codec {p.codec}", f"orders {', '.join(p.orders)}"]
        lines += [f"Data: {'; '.join(made_of)}.", ""]
    if data:
        lines += ["| corpus | tokens | windows trained on |", "|---|---|---|"]
        lines += [f"| {name} | {of.get('tokens', 0):,} | {consumed.get(name, 0):,} |" for name, of in data.items()]
        lines.append("")
    return lines


def _evaluation(results: Mapping[str, Any]) -> list[str]:
    lines = ["## Evaluation"]
    for name in SUITES.names():
        if not isinstance(results.get(name), dict):
            continue
        try:
            lines += _suite(SUITES[name], results[name])
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
            continue  # another version's, or damaged: the report says so
    if len(lines) == 1:
        lines.append("Not evaluated yet: `soda evaluate FOLDER`.")
    elif "split" in results:
        lines += ["", f"On {results.get('documents', 'all')} documents of the {results['split']} split."]
    return [*lines, ""]


def _suite(suite: Suite, result: Mapping[str, Any]) -> list[str]:
    rows = [row for row in suite.rows(result) if isinstance(row.value, int | float)]
    against = suite.against if any(row.baseline is not None for row in rows) else ""
    heads = ["", suite.unit or "value", *([against] if against else [])]
    lines = ["", f"### {suite.title}", suite.about, "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        of = f" of {row.of:,}" if isinstance(row.of, int) else ""
        cells = [row.label or row.name.replace("_", " "), _figure(row.value) + of]
        lines.append(f"| {' | '.join([*cells, *([_figure(row.baseline)] if against else [])])} |")
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else f"{value:,}"
