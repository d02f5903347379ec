"""Says in plain words how good the model is, what more training or data would gain, and which commands to run next.

Everything is computed from the run's own figures, and presented as such.
"""

from typing import Any

from .reading import as_dict, as_list, last
from .words import big, finite

LITTLE, SOME = 0.02, 0.2  # shares of the unigram's surprise that the model has removed
GAP = 0.25  # gap in nats between validation and training above which more data helps more than more steps
FLAT = 0.02  # nats gained in the second half of a run below which more steps make no noticeable difference


def quality(nll: dict, grammar: dict, listed: list[Any]) -> list[str]:
    """What the figures say about the model, in sentences."""
    found = []
    row = nll["all"]
    if row and row["change"] is not None and row["baseline"]:
        share = -row["change"] / row["baseline"]
        if share < LITTLE:
            means = "It has learned almost nothing from context yet"
        elif share < SOME:
            means = "It knows how the sounds of speech follow one another, but hardly what words are: expect babble"
        else:
            means = "It has learned a good part of what makes speech predictable: listen for words"
        found.append(
            f"{means}. On recordings it has not heard, a token surprises it {abs(share):.0%} "
            f"{'less' if share >= 0 else 'more'} than a table of frequencies."
        )
    rows = {row["name"]: row for row in grammar["rows"]}
    if (ended := rows.get("ended_by_itself")) and ended["of"]:
        found.append(f"{ended['value']:,} of {ended['of']:,} generated documents ended on their own.")
    judged = [as_dict(sample) for sample in listed if as_dict(sample).get("candidates")]
    heard = [sample for sample in judged if "model" in as_dict(sample.get("audio"))]
    drawn = sum(int(finite(sample.get("candidates")) or 0) for sample in heard)
    if drawn:
        good = sum(int(finite(sample.get("good")) or 0) for sample in heard)
        found.append(
            f"{good} of {drawn} sampled sounds are plausible by length, level, silence and end (which does not "
            "mean that they are words)."
        )
    return found


def prospects(train: list[dict], valid: list[dict], data: dict) -> list[str]:
    """What more steps or more data would gain, judging only by this run's loss curves."""
    losses = [(float(p["step"]), loss) for p in valid if (loss := finite(p.get("valid_loss"))) is not None]
    found = []
    tokens, held = last(train, "tokens"), finite(as_dict(data.get("tokens")).get("train"))
    passes = tokens / held if tokens and held else None
    if passes:
        found.append(f"It was trained on {big(tokens or 0)} tokens, {passes:.1f} times the training data.")
    if len(losses) >= 3:
        step, end = losses[-1]
        half = min(losses[:-1], key=lambda point: abs(point[0] - step / 2))
        gain = half[1] - end
        if gain > FLAT:
            found.append(
                f"From step {half[0]:,.0f} to {step:,.0f} the validation loss fell by {gain:.2f} nats, some of it as "
                "the learning rate fell. Doubling the steps can be expected to gain at most as much again."
            )
        else:
            found.append(
                f"From step {half[0]:,.0f} to {step:,.0f} the validation loss changed by {-gain:+.2f} nats: more steps "
                "of the same would gain almost nothing."
            )
        recent = [x for p in train[-max(1, len(train) // 10) :] if (x := finite(p.get("loss"))) is not None]
        if recent and (gap := end - sum(recent) / len(recent)) > GAP:
            found.append(
                f"It does better by {gap:.2f} nats on what it was trained on than on other recordings: more data would "
                "gain more than more steps."
            )
        elif passes and passes < 1.5:
            found.append("It has not seen the data often enough to memorise them: try more steps first.")
    return found


def commands(train: list[dict], has_text: bool, trained: bool) -> list[tuple[str, str]]:
    """(purpose, command); RUN stands for the page's folder."""
    if not trained:
        return [("Train it", "soda train RUN")]
    steps = last(train, "step") or 0
    found = []
    if has_text:
        found.append(("Have it say something", 'soda generate RUN tasks=[speak] generate.text="good morning"'))
    found += [
        ("Draw other samples", "soda generate RUN seed=5678 generate.candidates=20"),
        ("Build this page again", "soda report RUN"),
    ]
    if steps:
        longer = f"soda train RUN/recipe.yaml run=RUN-longer data.path=RUN/data training.steps={2 * steps:.0f}"
        found.append(("Train again on the same data for twice the steps", longer))
    return found


def speaks(listed: Any) -> bool:
    return any(as_dict(sample).get("task") == "speak" for sample in as_list(listed))
