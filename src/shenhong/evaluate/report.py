"""The report of a run, as one self-contained HTML page and as Markdown.

It reads only files of the run folder: manifest.json, events.jsonl, evaluation.json, corpus/report.json and
recipe.toml; what is absent is left out of the report, so it can be written at any time. Everything read is text
to escape, never markup.
"""

from __future__ import annotations

import datetime
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import tomli_w

from shenhong.errors import RunError
from shenhong.evaluate import words
from shenhong.evaluate.charts import Curves, Loads, Series, Shares, short
from shenhong.evaluate.page import (
    Block,
    Grid,
    Heading,
    Note,
    Table,
    Tiles,
    Verbatim,
    markdown_page,
    page,
    share,
)
from shenhong.runs.events import read_events
from shenhong.runs.files import atomic_write
from shenhong.runs.run import plan_of

if TYPE_CHECKING:
    from shenhong.domains.base import Domain

Json = Mapping[str, Any]
_LAYERS_DRAWN = 6  # each with a curve of its own; of more, the mean and the worst


def write_report(run_dir: Path, domain: Domain) -> tuple[str, str]:
    """Writes report.html and report.md into the run folder and returns them. Errors: RunError."""
    run_dir = Path(run_dir)
    manifest = _read_json(run_dir / "manifest.json")
    if manifest is None:
        raise RunError(f"no manifest.json in {run_dir}; give the folder of a run")
    recipe = _read_text(run_dir / "recipe.toml")
    evaluation = _read_json(run_dir / "evaluation.json") or {}
    events = read_events(run_dir)
    name = manifest.get("name") or _recipe_name(recipe) or run_dir.resolve().name
    trainings = _trainings(manifest, events)
    blocks = [
        *_headline(manifest, evaluation, domain, trainings),
        *domain.blocks(evaluation),
        *_bits(evaluation),
        *_originality(evaluation),
        *(block for training in trainings for block in _training(training)),
        *(block for training in trainings for block in _experts(training)),
        *_cost(manifest, trainings),
        *_refining(_read_json(run_dir / "corpus" / "report.json") or {}),
        *_settings(manifest, recipe),
    ]
    blocks = [block for block in blocks if block.html()]
    subtitle = _subtitle(manifest)
    title = f"{name}: a Shenhong run"
    html, markdown = page(title, subtitle, blocks), markdown_page(title, subtitle, blocks)
    atomic_write(run_dir / "report.html", html)
    atomic_write(run_dir / "report.md", markdown)
    return html, markdown


def headline(run_dir: Path, domain: Domain) -> list[str]:
    """The measures at the head of the report, a line each, for a terminal. Errors: RunError."""
    run_dir = Path(run_dir)
    manifest = _read_json(run_dir / "manifest.json")
    if manifest is None:
        raise RunError(f"no manifest.json in {run_dir}; give the folder of a run")
    evaluation = _read_json(run_dir / "evaluation.json") or {}
    tiles = _tiles(manifest, evaluation, domain)
    lines = [f"{name}: {value}{f' ({beside})' if beside else ''}" for name, value, beside in tiles]
    return lines + _sentences(evaluation, _trainings(manifest, read_events(run_dir)))


# --- sections ---------------------------------------------------------------------------------------


def _tiles(manifest: Json, evaluation: Json, domain: Domain) -> list[tuple[str, str, str]]:
    """(measure, value, what it is beside) of what matters most."""
    tiles: list[tuple[str, str, str]] = []
    bits = _get(evaluation, "bits_per_character", "model", "bits_per_character")
    rival = _rival(evaluation)
    if bits:
        beside = f"{rival['order']}-gram {_number(rival['bits_per_character'], 3)}" if rival else ""
        tiles.append(("bits per character, held out", _number(bits, 3), beside))
    tiles += domain.tiles(evaluation)
    if seconds := _total_seconds(manifest):
        cores = _get(manifest, "machine", "cores")
        tiles.append(("wall-clock", _time(seconds), f"on {cores} cores" if cores else ""))
    if peak := _peak(manifest):
        tiles.append(("peak memory", _bytes(peak), ""))
    return tiles


def _sentences(evaluation: Json, trainings: Sequence[Training]) -> list[str]:
    found = [words.continued(training.validations) for training in trainings]
    bits = _get(evaluation, "bits_per_character", "model", "bits_per_character", "value")
    rival = _rival(evaluation)
    if rival and bits is not None and trainings:
        found.append(words.beside_ngram(bits, rival, trainings[-1].plan))
    return [sentence for sentence in found if sentence]


def _headline(
    manifest: Json, evaluation: Json, domain: Domain, trainings: Sequence[Training]
) -> list[Block]:
    tiles = _tiles(manifest, evaluation, domain)
    bits = _get(evaluation, "bits_per_character", "model", "bits_per_character")
    rival = _rival(evaluation)
    out: list[Block] = [Tiles(tiles)] if tiles else []
    rows = [[*row, "–"] for row in domain.headline(evaluation)]
    if bits:
        gram = _estimate(rival["bits_per_character"], 3) if rival else "–"
        rows.insert(0, ["bits per character", _estimate(bits, 3), "–", "–", gram])
    generation = evaluation.get("generation") or {}
    if pair := _get(generation, "distinct", "2"):
        rows.append(
            ["distinct-2", _percent(pair.get("model")), _percent(pair.get("human")), "–", "–"]
        )
    if copying := generation.get("copying"):
        copied = (share(_get(copying, who, "lines_copied")) for who in ("model", "human"))
        rows.append(["lines copied from training", *copied, "–", "–"])
    if rows:
        name = f"{rival['order']}-gram" if rival else "n-gram"
        table = _table(["measure", "model", "human", "shuffled", name], rows)
        out += [Heading("In one table"), table]
    sentences = _sentences(evaluation, trainings)
    return out + [Note(f"{sentence[0].upper()}{sentence[1:]}.") for sentence in sentences]


def _table(head: list[str], rows: list[list[str]]) -> Table:
    """Without the columns that have nothing to say of this kind of text."""
    told = [i for i in range(len(head)) if any(row[i] != "–" for row in rows)]
    return Table([head[i] for i in told], [[row[i] for i in told] for row in rows])


def _bits(evaluation: Json) -> list[Block]:
    bits = evaluation.get("bits_per_character") or {}
    rows = []
    if model := bits.get("model"):
        rows.append(["this model", "", _estimate(model.get("bits_per_character"), 3), ""])
    for entry in bits.get("ngrams") or []:
        order = entry.get("order")
        name = "unigram" if order == 1 else f"Kneser-Ney {order}-gram"
        source = {"seen": "the text the model saw", "all": "the whole training split"}.get(
            entry.get("source"), str(entry.get("source"))
        )
        source += f" ({short(entry['characters'])} characters)" if "characters" in entry else ""
        rows.append([name, source, _estimate(entry.get("bits_per_character"), 3), share(entry.get("model_below"))])  # fmt: skip
    if not rows:
        return []
    out: list[Block] = [
        Heading("How well it predicts held-out text"),
        Table(["", "trained on", "bits per character", "the model is below by"], rows, words=2),
    ]
    if model:
        out.append(
            Note(
                f"{_estimate(model.get('nats_per_token'), 4)} nats per token and "
                f"{_estimate(model.get('nats_per_character'), 4)} nats per character, at "
                f"{_plain(model.get('characters_per_token'), 3)} characters a token; the two are never mixed. "
                "Punctuation and the end of each text are paid for, prompts are not. ± is one standard error."
            )
        )
    return out


def _originality(evaluation: Json) -> list[Block]:
    generation = evaluation.get("generation") or {}
    if not generation:
        return []
    rows = [
        [f"distinct-{n}", _percent(pair.get("model")), _percent(pair.get("human"))]
        for n, pair in (generation.get("distinct") or {}).items()
    ]
    model, human = (_get(generation, "copying", who) or {} for who in ("model", "human"))
    if model:
        rows += [
            ["lines that stand in the training text", share(model.get("lines_copied")), share(human.get("lines_copied"))],
            ["longest run of copied characters", str(model.get("longest_run")), str(human.get("longest_run", "–"))],
            ["mean longest run of an answer", _estimate(model.get("mean_run"), 2), _estimate(human.get("mean_run"), 2)],
        ]  # fmt: skip
    note = (
        f"{generation.get('prompts')} answers to held-out prompts at temperature "
        f"{generation.get('temperature')}, one each, none masked, retried or mended; the human column is the "
        "held-out texts of the same prompts."
    )
    if model.get("longest_run_text"):
        note += f" The longest copied run: {model['longest_run_text'][:200]}"
    return [
        Heading("Variety and copying"),
        Table(["measure", "model", "human"], rows),
        Note(note),
    ]


class Training(NamedTuple):
    """One of a run's trainings: its stage, its frozen plan, and its events."""

    stage: str
    plan: Json
    steps: Sequence[Json]
    validations: Sequence[Json]

    def heading(self, of: str) -> Heading:
        """Where a run trains once, the stage has no name of its own."""
        return Heading(
            of if self.stage == "train" else f"{of}: {self.stage.removesuffix('/train')}"
        )


def _trainings(manifest: Json, events: Sequence[Json]) -> list[Training]:
    """In the order of the plan."""
    named = {e.get("stage", "train") for e in events if e.get("kind") == "train"}
    stages = [s for s in plan_of(dict(manifest)) if s in named or _get(manifest, s, "steps")]

    def of(stage: str, kind: str) -> list[Json]:
        return [e for e in events if e.get("kind") == kind and e.get("stage", "train") == stage]

    return [
        Training(stage, _get(manifest, stage) or {}, of(stage, "train"), of(stage, "valid"))
        for stage in stages
    ]


def _training(training: Training) -> list[Block]:
    train, valid = training.steps, training.validations
    if not train:
        return []

    def loss(axis: str) -> list[Series]:
        series = [
            Series("training", _column(train, axis), _column(train, "loss", 1 / math.log(2))),
            Series("held out", _column(valid, axis), _column(valid, "nats_per_token", 1 / math.log(2))),
            Series("two tokens ahead (MTP)", _column(train, axis), _column(train, "mtp_loss", 1 / math.log(2))),
        ]  # fmt: skip
        return series

    per_character = [
        Series("held out", _column(valid, "seconds"), _column(valid, "nats_per_character", 1 / math.log(2)))
    ]  # fmt: skip
    steps = _column(train, "step")
    charts: list[Block] = [
        Curves("Bits per token", "step", loss("step")),
        Curves("Bits per token", "seconds of training", loss("seconds")),
        Curves("Bits per character", "seconds of training", per_character),
        Curves("Learning rate", "step", [Series("rate", steps, _column(train, "lr"))], True),
        Curves("Gradient norm", "step", [Series("norm before clipping", steps, _column(train, "grad_norm"))], True),
        Curves("Tokens per second", "step", [Series("speed", steps, _column(train, "tokens_per_second"))], True),
    ]  # fmt: skip
    return [training.heading("Training"), Grid([chart for chart in charts if chart.html()])]


def _experts(training: Training) -> list[Block]:
    train = training.steps
    loads = [e for e in train if e.get("load_max")]
    blocks: list[Block] = []
    if loads:
        layers = min(len(e["load_max"]) for e in loads)
        steps = _column(loads, "step")
        if layers <= _LAYERS_DRAWN:
            series = [
                Series(f"MoE {n + 1}", steps, [e["load_max"][n] for e in loads])
                for n in range(layers)
            ]
        else:
            series = [
                Series("worst layer", steps, [max(e["load_max"]) for e in loads]),
                Series(
                    "mean of layers",
                    steps,
                    [sum(e["load_max"]) / len(e["load_max"]) for e in loads],
                ),
            ]
        blocks.append(Curves("Busiest expert's load over the mean load", "step", series))
    histograms = [e["load"] for e in train if e.get("load")]
    if histograms:
        blocks.append(Loads("Load of each expert at the end, 1 = even", histograms[-1]))
    return [training.heading("Experts"), Grid(blocks)] if blocks else []


def _cost(manifest: Json, trainings: Sequence[Training]) -> list[Block]:
    stages = {k: v for k, v in (manifest.get("stages") or {}).items() if isinstance(v, Mapping)}
    timed = [
        (name, float(stage["seconds"]), _time(stage["seconds"]))
        for name, stage in stages.items()
        if isinstance(stage.get("seconds"), int | float)
    ]
    out: list[Block] = [Heading("What it cost")]
    if timed:
        out.append(Shares(f"Wall-clock of the stages, {_time(sum(t for _, t, _ in timed))}", timed))
    rows: list[list[str]] = []
    total = _total_seconds(manifest)
    if total:
        rows.append(["wall-clock of the run", _time(total)])
    if plan := next((t.plan for t in trainings[::-1] if "parameters" in t.plan), None):
        active = (
            f" ({short(plan['active_parameters'])} active)" if "active_parameters" in plan else ""
        )
        rows.append(["parameters", short(plan["parameters"]) + active])
    for training in trainings:
        if "steps" in training.plan:
            of = "" if training.stage == "train" else f", {training.stage.removesuffix('/train')}"
            steps, each = training.plan["steps"], training.plan.get("tokens_per_step", 0)
            rows.append([f"optimizer steps{of}", f"{steps:,} of {short(each)} tokens"])
    tokens = sum(_tokens(training) for training in trainings)
    seconds = sum(_seconds(training, stages) for training in trainings)
    if tokens:
        rows.append(["tokens trained on", f"{tokens:,}"])
        if seconds:
            rows.append(["tokens per second of training", f"{tokens / seconds:,.0f}"])
        flops = sum(_tokens(t) * t.plan.get("flops_per_token", 0) for t in trainings)
        if flops:
            rows.append(["floating-point operations", f"{flops:.3g}"])
            if seconds:
                rows.append(["… per second of training", f"{flops / seconds / 1e9:.1f} GFLOP/s"])
    if peak := _peak(manifest):
        rows.append(["peak memory", _bytes(peak)])
    if rows:
        out.append(Table(["", "measured"], rows))
    return out if len(out) > 1 else []


def _tokens(training: Training) -> int:
    """As its events count them, else as it was planned."""
    if training.steps and (found := training.steps[-1].get("tokens")) is not None:
        return int(found)
    plan = training.plan
    whole = _numbers(plan, "steps", "tokens_per_step")
    return plan["steps"] * plan["tokens_per_step"] if whole else 0


def _seconds(training: Training, stages: Json) -> float:
    found = training.steps[-1].get("seconds") if training.steps else None
    return found or _get(stages, training.stage, "seconds") or 0.0


def _refining(report: Json) -> list[Block]:
    """corpus/report.json: {"steps": [{"step", "what", "kept", "dropped": {reason: count}, "changed",
    "changed_nothing", "seconds", "examples": {reason: [{"text", "became"?, …}]}}], "splits"}."""
    steps = [s for s in report.get("steps") or [] if isinstance(s, Mapping)]
    if not steps:
        return []
    rows, examples = [], []
    for step in steps:
        name = str(step.get("step") or step.get("name") or "")
        dropped = step.get("dropped")
        reasons = dropped if isinstance(dropped, Mapping) else {}
        lost = sum(n for n in reasons.values() if isinstance(n, int)) if reasons else dropped or 0
        what = str(step.get("what", "")) + (
            "; it changed nothing" if step.get("changed_nothing") else ""
        )
        rows.append(
            [
                name,
                what,
                _count(step.get("kept")),
                _count(lost),
                _count(step.get("changed")),
                _plain(step.get("seconds"), 1),
            ]
        )
        shown = [f"{reason}: {_count(count)}" for reason, count in reasons.items()]
        shown += [text[:240] for text in _examples(step.get("examples"))]
        if shown:
            examples.append(Verbatim(f"{name}: reasons and examples", "\n".join(shown)))
    table = Table(["step", "what", "kept", "dropped", "changed", "seconds"], rows, words=2)
    out: list[Block] = [Heading("Refining the text"), table, *examples]
    splits = report.get("splits")
    if isinstance(splits, Mapping):
        out.append(Note("Written: " + "; ".join(f"{k} {_flat_text(v)}" for k, v in splits.items())))
    return out


def _settings(manifest: Json, recipe: str | None) -> list[Block]:
    machine = manifest.get("machine") or {}
    rows = [[str(key), _flat_text(value)] for key, value in machine.items()]
    if "seed" in manifest:
        rows.append(["seed", str(manifest["seed"])])
    out: list[Block] = []
    if rows:
        out.append(Table(["machine", ""], rows, words=2))
    if recipe:
        out.append(Verbatim("recipe.toml", _placeless(recipe)))
    return [Heading("Settings"), *out] if out else []


def _placeless(recipe: str) -> str:
    """A recipe without the folders of this machine: of an absolute path, the last name is enough."""
    try:
        tree = tomllib.loads(recipe)
        paths = tree["corpus"]["paths"]
        tree["corpus"]["paths"] = [Path(p).name if Path(p).is_absolute() else p for p in paths]
    except (tomllib.TOMLDecodeError, KeyError, TypeError):
        return recipe  # damaged; a report shows what there is
    return tomli_w.dumps(tree)


# --- words and numbers ------------------------------------------------------------------------------


def _subtitle(manifest: Json) -> str:
    parts = []
    created = manifest.get("created")
    if isinstance(created, int | float):
        moment = datetime.datetime.fromtimestamp(created, datetime.UTC)
        parts.append(f"begun {moment:%Y-%m-%d %H:%M} UTC")
    elif created:
        parts.append(f"begun {created}")
    if cpu := _get(manifest, "machine", "cpu"):
        parts.append(str(cpu))
    if version := manifest.get("shenhong"):
        parts.append(f"shenhong {version}")
    return " · ".join(parts)


def _rival(evaluation: Json) -> Json | None:
    """The n-gram to stand beside the model: the highest order of the text it saw, else of all text."""
    ngrams = _get(evaluation, "bits_per_character", "ngrams") or []
    return max(ngrams, key=lambda e: (e.get("source") == "seen", e.get("order", 0)), default=None)


def _total_seconds(manifest: Json) -> float | None:
    total = manifest.get("seconds_total")
    if isinstance(total, int | float):
        return total
    stages = (s.get("seconds") for s in (manifest.get("stages") or {}).values())
    known = [s for s in stages if isinstance(s, int | float)]
    return sum(known) if known else None


def _peak(manifest: Json) -> int | None:
    stages = (s.get("peak_bytes") for s in (manifest.get("stages") or {}).values())
    return max((p for p in stages if isinstance(p, int)), default=None)


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _estimate(estimate: Json | None, digits: int) -> str:
    text = _number(estimate, digits)
    error = (estimate or {}).get("error")
    return f"{text} ± {error:.{digits}f}" if isinstance(error, int | float) else text


def _number(estimate: Json | None, digits: int) -> str:
    return _plain((estimate or {}).get("value"), digits)


def _plain(number: object, digits: int) -> str:
    return f"{number:.{digits}f}" if isinstance(number, int | float) else "–"


def _percent(number: object) -> str:
    return f"{100 * number:.1f} %" if isinstance(number, int | float) else "–"


def _count(number: object) -> str:
    return f"{number:,}" if type(number) is int else "–" if number is None else str(number)


def _numbers(mapping: Json, *keys: str) -> bool:
    return all(isinstance(mapping.get(key), int | float) for key in keys)


def _column(events: Sequence[Json], key: str, scale: float = 1.0) -> list[float]:
    """One number an event; NaN (left out of curves) where an event lacks it."""
    values = (e.get(key) for e in events)
    return [v * scale if isinstance(v, int | float) else math.nan for v in values]


def _get(mapping: Json, *keys: str) -> Any:
    value: Any = mapping
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _examples(examples: object) -> list[str]:
    """Examples by reason, one line each."""
    out = []
    for reason, items in (examples if isinstance(examples, Mapping) else {}).items():
        for item in items if isinstance(items, list) else [items]:
            if isinstance(item, Mapping):
                more = (str(v) for k, v in item.items() if k not in ("id", "text"))
                item = " → ".join([str(item.get("text", "")), *more])
            out.append(f"[{reason}] {item}")
    return out


def _flat_text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_count(part)}" for key, part in value.items())
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _recipe_name(recipe: str | None) -> str | None:
    try:
        name = tomllib.loads(recipe or "").get("name")
    except tomllib.TOMLDecodeError:
        return None
    return name if isinstance(name, str) else None


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RunError(
            f"cannot read {path}: {error.strerror}; mend it or run the stage again"
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None if there is no file. Errors: RunError."""
    text = _read_text(path)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunError(
            f"{path} is not JSON ({error}); run the stage that writes it again"
        ) from error
    if not isinstance(value, dict):
        raise RunError(f"{path} holds no JSON object; run the stage that writes it again")
    return value
