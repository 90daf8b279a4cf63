"""Which keys of a recipe may change when a run goes on: one table, which the comparison in `runs/folder.py` and documents read.

A run that goes on with `autoresume` is compared with the recipe it was started with. `RULES` says for every key whether it may
be another one now, why, and what follows. What may not simply change can be allowed by name, `resume: {allow: [optimizer.lr]}`,
unless the state in the checkpoint would not fit any more. What changed is kept in `<run folder>/changes.jsonl`.

Nothing here imports PyTorch or Composer.
"""

import dataclasses
import fnmatch
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from prx_composer.common.errors import UserError, redacted

May = Literal["free", "logged", "data", "asked", "never"]
DATA = "data"  # not a key of a recipe: what the data are, by their fingerprint, wherever they lie
ABSENT = "<absent>"  # a key that one of two recipes doesn't have


@dataclasses.dataclass(frozen=True)
class Rule:
    """What holds for the keys that a pattern names.

    Args:
        keys: a dotted key; `*` stands for one part, and `**` at the end for the key itself and everything below it. Several are
            divided by spaces.
        may: `free`: it changes nothing that is learned. `logged`: it may change, which is said and kept. `data`: it may change if
            the data are the same by their fingerprint, else as `asked`. `asked`: with `resume.allow`. `never`: in another run.
        why: in words, a whole sentence.
        follows: what follows from the change, a whole sentence; of `never`: what to do instead.
    """

    keys: str
    may: May
    why: str
    follows: str

    @property
    def answer(self) -> str:
        """Return, in a few words, whether the key may change."""
        return _SAID[self.may]


_NETWORK = "The weights in the checkpoint are of this network."
_FROM_WEIGHTS = "Another run can begin from these weights: `model.init_from=<run folder>`."
_OWN_WEIGHTS = "It has trained weights of its own, which the checkpoint has or lacks."
_RATE = "Every step from here on depends on it."
_AT_ONCE = "The new value holds from the first step after the checkpoint; what was learned before stays."
_NEW_PASS = "Where numbers of samples differ, a new pass begins; else it goes on at the same place."
_WATCHES = "It watches the run and takes no part in it."

RULES = (
    # ---- where and how a run is kept
    Rule("run_folder", "free", "Where a run lies is no part of it.", "The run goes on in the folder that was moved."),
    Rule("run_name", "logged", "A name is no part of what is learned.", "Trackers may show another name from here on."),
    Rule("autoresume resume", "free", "They say how to go on, not what to train.", "Nothing."),
    Rule("progress_bar preflight dist_timeout", "free", "They change nothing that is learned.", "Nothing."),
    Rule("variables**", "free", "Only the keys that use them count, and those are compared.", "Nothing."),
    Rule(
        "code_paths",
        "logged",
        "The files are yours: what is in them is not compared.",
        "What they register is used from here on.",
    ),
    Rule("save_folder", "free", "Where a run is copied to is no part of it.", "The next checkpoint is copied there."),
    Rule(
        "save_interval save_num_checkpoints_to_keep",
        "logged",
        "Checkpoints are no part of what is learned.",
        "They come at other times.",
    ),
    # ---- how long
    Rule(
        "max_duration",
        "logged",
        "A run may be made longer or shorter.",
        "Times in `dur`, and a decay to the end, are reckoned anew.",
    ),
    Rule("time_budget", "logged", "A run may be given more or less time.", "Parts of the budget that lie ahead move with it."),
    # ---- what watches
    Rule("eval_loader.num_workers global_eval_batch_size", "free", "An evaluation does not depend on them.", "Nothing."),
    Rule(
        "eval_loader** eval_interval eval_subset_num_batches",
        "logged",
        _WATCHES,
        "Its numbers may not compare with earlier ones.",
    ),
    Rule("callbacks** loggers**", "logged", _WATCHES, "Pictures, scores and records are as the new values say."),
    Rule(
        "algorithms.skip_nonfinite**",
        "logged",
        "It changes only steps that would be lost.",
        "Such steps are treated in the new way.",
    ),
    # ---- data
    Rule("train_loader.num_workers", "free", "Order and draws belong to the samples, not to workers.", "Nothing."),
    Rule("train_loader.max_undecodable", "logged", "It says only when a run is to end.", "The new limit holds at once."),
    Rule("train_loader", "never", "The place in the data is of this loader.", _FROM_WEIGHTS),
    Rule("data", "asked", "What is learned depends on the data.", _NEW_PASS),
    Rule(
        "train_loader.path train_loader.remote train_loader.split train_loader.source** train_loader.skip train_loader.mix.*.path"
        " train_loader.mix.*.remote train_loader.mix.*.split train_loader.mix.*.source** train_loader.mix.*.skip",
        "data",
        "What is learned depends on the data, wherever they lie.",
        _NEW_PASS,
    ),
    Rule("train_loader**", "asked", "What is learned depends on it.", _AT_ONCE),
    # ---- model
    Rule("model.init_from", "asked", "A run that goes on has the weights of its checkpoint.", "It is not read."),
    Rule("model model.backbone**", "never", _NETWORK, _FROM_WEIGHTS),
    Rule(
        "model.text_encoder.tokenizer** model.text_encoder.encoders.*.tokenizer**",
        "never",
        "A run keeps its tokenizer in its folder.",
        _FROM_WEIGHTS,
    ),
    Rule(
        "model.text_encoder.config** model.text_encoder.trainable model.text_encoder.pooled model.text_encoder.tokens**"
        " model.text_encoder.encoders model.text_encoder.encoders.* model.text_encoder.encoders.*.config**"
        " model.text_encoder.encoders.*.trainable model.text_encoder.encoders.*.pooled",
        "never",
        _NETWORK,
        _FROM_WEIGHTS,
    ),
    Rule("model.text_encoder model.autoencoder model.autoencoder.config**", "never", _NETWORK, _FROM_WEIGHTS),
    Rule(
        "model.compile model.attention model.activation_memory_budget model.text_encoder.compile"
        " model.text_encoder.encoders.*.compile",
        "asked",
        "It rounds differently.",
        "Not to the bit.",
    ),
    Rule(
        "model.flow model.flow.prediction",
        "asked",
        "The network was trained to predict it.",
        "It learns anew what its output means.",
    ),
    Rule(
        "model.flow.solver_order model.flow.sigma_min model.flow.sigma_max model.flow.rho",
        "logged",
        "They say how images are drawn, not what is learned.",
        "Pictures and scores are drawn by the new steps.",
    ),
    Rule("model**", "asked", "The network was trained with it.", _AT_ONCE),
    # ---- optimizer
    Rule(
        "optimizer optimizer.split_heads optimizer.split_qkv optimizer.normuon optimizer.exclude",
        "never",
        "Its state in the checkpoint is of this optimizer.",
        _FROM_WEIGHTS,
    ),
    Rule("optimizer**", "asked", _RATE, _AT_ONCE),
    Rule("scheduler**", "asked", _RATE, "The rate is what the new schedule says for this step."),
    # ---- algorithms
    Rule(
        "algorithms.repa algorithms.irepa algorithms.readouts algorithms.internal_guidance",
        "never",
        _OWN_WEIGHTS,
        "To train on without it, set its `end` to a step that has passed.",
    ),
    Rule(
        "algorithms.lora algorithms.lora.rank algorithms.lora.targets algorithms.sprint algorithms.resolution_aware"
        " algorithms.repa.projector_hidden algorithms.repa.adapter** algorithms.irepa.kernel_size"
        " algorithms.readouts.heads** algorithms.internal_guidance.block",
        "never",
        _OWN_WEIGHTS,
        _FROM_WEIGHTS,
    ),
    Rule("algorithms.lora.alpha", "never", "It scales what was learned before, too.", _FROM_WEIGHTS),
    Rule(
        "algorithms.ema",
        "asked",
        "What is drawn and exported is this average.",
        "A new average begins with these weights; without one, the weights themselves are drawn and exported.",
    ),
    Rule("algorithms.ema**", "asked", "What is drawn and exported is this average.", "The average goes on with the new value."),
    Rule("algorithms**", "asked", _RATE, _AT_ONCE),
    # ---- the step
    Rule("seed", "asked", "Order and noise are drawn from it.", "They are others from here on."),
    Rule("global_train_batch_size image_size", "asked", _RATE, _AT_ONCE),
    Rule("device_train_microbatch_size", "asked", "Noise is drawn by microbatch.", "The same samples, with other noise."),
    Rule("precision", "asked", "It rounds differently.", _AT_ONCE),
    Rule(
        "parallelism_config.fsdp.reshard_after_forward",
        "free",
        "It says when weights are gathered, not what they are.",
        "Nothing.",
    ),
    Rule("parallelism_config", "never", "A sharded checkpoint is read by a sharded run.", _FROM_WEIGHTS),
    Rule("parallelism_config**", "asked", "It rounds differently.", "Not to the bit."),
)
_UNKNOWN = Rule("**", "asked", "It is not known whether it matters.", _AT_ONCE)


@dataclasses.dataclass(frozen=True)
class Change:
    """A key that differs.

    Args:
        key: dotted, with `[0]` for items of lists.
        before, now: `ABSENT` where there is none.
    """

    key: str
    before: Any
    now: Any

    @property
    def rule(self) -> Rule:
        return rule_of(self.key)

    def __str__(self) -> str:
        return f"{self.key} ({_shown(self.key, self.before)} → {_shown(self.key, self.now)})"


# ------------------------------------------------------------------------------------------------------- the table


def rule_of(key: str) -> Rule:
    """Return the first rule that names a key. A component of a stranger is in none: its arguments must be allowed by name."""
    plain = _plain(key)
    return next((rule for rule in RULES if any(_matches(plain, pattern) for pattern in rule.keys.split())), _UNKNOWN)


def _plain(key: str) -> str:
    return ".".join(part.partition("[")[0] for part in key.split("."))


def _matches(key: str, pattern: str) -> bool:
    parts = key.split(".")
    if pattern.endswith("**"):
        wanted = pattern.removesuffix("**").split(".")
        parts = parts[: len(wanted)]
    else:
        wanted = pattern.split(".")
    return len(parts) == len(wanted) and all(fnmatch.fnmatchcase(*pair) for pair in zip(parts, wanted, strict=True))


_SAID = {
    "free": "yes",
    "logged": "yes, and it is said",
    "data": "if the data are the same",
    "asked": "with `resume.allow`",
    "never": "no",
}


def table() -> str:
    """Return the rules as a table in Markdown, for the documents."""
    named = [(", ".join(f"`{keys}`" for keys in rule.keys.split()), rule) for rule in RULES]
    rows = [
        f"| {keys} | {rule.answer} | {rule.why} | {rule.follows} |"
        for keys, rule in (*named, ("anything else: a stranger's component, say", _UNKNOWN))
    ]
    return "\n".join(["| key | may it change? | why | what follows |", "|---|---|---|---|", *rows]) + "\n"


def check_allowed(resume: Any) -> None:
    """Raise UserError unless `resume` is `{allow: [keys of a recipe]}`, and none of them is one that nothing can allow."""
    if not isinstance(resume, Mapping) or resume.keys() - {"allow"}:
        raise UserError(f"resume: expected a mapping such as {{allow: [optimizer.lr]}}, not {resume!r}.")
    allow = resume.get("allow", [])
    if not isinstance(allow, list | tuple) or not all(isinstance(key, str) for key in allow):
        raise UserError(f"resume.allow: expected a list of keys such as [optimizer.lr], not {allow!r}.")
    known = sorted({pattern.partition(".")[0].rstrip("*") for rule in RULES for pattern in rule.keys.split()})
    for key in allow:
        if _plain(key).partition(".")[0] not in known:
            raise UserError(f"resume.allow: {key}: no such key in a recipe. Allowed: {', '.join(known)}, and keys below them.")
        if "." in key and (rule := rule_of(key)).may == "never":
            raise UserError(f"resume.allow: {key} cannot change within a run. {rule.why} {rule.follows}")


# ------------------------------------------------------------------------------------------------------------- what is said


def advice(keys: Sequence[str]) -> str:
    """Return what to add to a command so that these keys may change; quoted for a shell, where brackets mean something."""
    lists = dict.fromkeys(key.partition("[")[0] for key in keys)  # brackets would end a list on a command line
    return shlex.quote(f"resume.allow=[{','.join(lists)}]")


def against_what_is_not_finite() -> str:
    """Return what helps a run whose losses or gradients are not finite to go on from its checkpoint, and what to type."""
    return (
        "a lower learning rate (optimizer.lr=…), a longer warm-up (scheduler.t_warmup=…), algorithms.gradient_clipping, or the "
        "end of the term that fails first (algorithms.<term>.end=<batch>ba). Name beside it what you change:  "
        f"{advice(['optimizer.lr'])} ."
    )


def _shown(key: str, value: Any) -> str:
    if value == ABSENT:
        return "not there"
    text = repr(hidden(key, value))
    return text if len(text) <= 120 else f"{text[:117]}…"


def hidden(key: str, value: Any) -> Any:
    """Return a value as it may be shown: a password isn't."""
    name = key.rpartition(".")[2]
    return redacted({name: value})[name]
