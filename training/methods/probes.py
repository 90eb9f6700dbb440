"""The probe family as one rival: several probes are fitted on the same vectors, and val chooses among them.

Each candidate is a method of the family under settings of its own, fitted as that method is: ridge and RBF ridge choose
their knobs by leaving out, so that val sees one fit of each; of logistic regression and LDA val sees every strength.
Each of these is a look at val, which chooses by accuracy and then by log loss; of equals the first one is kept. Which
probe is best depends on the vectors: ridge wins on many dimensions, logistic regression on few.

By default the vectors are the pooled one, before the projection, beside second-order moments of tokens.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from fieldmark.params import Block
from training.data import Cache, feature_words
from training.folds import settle
from training.layers.features import feature_also_reads, feature_reads, require_feature
from training.layers.logistic import require_val
from training.layers.states import State
from training.methods import Fitted, lda, linear_probe, rbf_ridge, ridge, single_points

SEEDED = False
READS = feature_words()
ALSO = READS
reads, also_reads = feature_reads, feature_also_reads
FAMILY: dict[str, Any] = {"linear_probe": linear_probe, "ridge": ridge, "rbf_ridge": rbf_ridge, "lda": lda}
LEAVING_OUT = ("ridge", "rbf_ridge")  # these choose their knobs by the training images


class Candidate(Block):
    """A method of the family, with what differs from its defaults; all candidates have the same vectors."""

    method: Literal["linear_probe", "ridge", "rbf_ridge", "lda"]
    settings: dict[str, Any] = Field(default={})

    @model_validator(mode="after")
    def check(self) -> Self:
        if "features" in self.settings:
            raise ValueError("features stand beside candidates and are the same for all of them")
        try:
            self.of(["global"])
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))} of its settings: {first['msg']}") from None
        return self

    @property
    def name(self) -> tuple[str, str]:
        """Its method and transform, which tell candidates apart."""
        return self.method, self.settings.get("transform", "none")

    def of(self, features: list[str]) -> Block:
        """The settings of its method on these vectors."""
        found: Block = FAMILY[self.method].Settings(features=features, **self.settings)
        return found

    def under(self, settings: Block) -> "Candidate":
        """The same under other settings of its method."""
        return Candidate(method=self.method, settings=settings.model_dump(exclude={"features"}, exclude_defaults=True))

    def points(self, features: list[str]) -> list["Candidate"]:
        """What val sees of it."""
        if self.method in LEAVING_OUT:
            return [self]
        return [self.under(point) for point in single_points(self.of(features))]


class Settings(Block):
    features: list[Annotated[str, AfterValidator(require_feature)]] = Field(
        default=["pooled", "isqrt"], min_length=1
    )  # vectors put side by side, as those of linear_probe
    candidates: list[Candidate] = Field(
        default=[
            Candidate(method="linear_probe", settings={"l2": [10.0, 1.0, 0.1, 0.01, 0.001, 0.0001]}),
            Candidate(method="ridge"),
            Candidate(method="rbf_ridge"),
            Candidate(method="lda", settings={"shrinkage": [0.1, 0.3, 0.6]}),
        ],
        min_length=1,
    )  # methods of the family, each once a transform, with the settings that val or leaving out chooses from

    @field_validator("candidates")
    @classmethod
    def check(cls, candidates: list[Candidate]) -> list[Candidate]:
        if len({candidate.name for candidate in candidates}) < len(candidates):
            raise ValueError("one method stands there twice with the same transform")
        return candidates

    def points(self) -> list[Self]:
        """What val chooses among: one candidate, under settings that leave nothing more to choose."""
        points = [point for candidate in self.candidates for point in candidate.points(self.features)]
        return [self.model_copy(update={"candidates": [point]}) for point in points]

    def named(self, chosen: dict[str, float | str]) -> Candidate:
        """The candidate that Fitted.chosen names."""
        [candidate] = [one for one in self.candidates if one.name == (chosen["probe"], chosen["transform"])]
        return candidate

    def candidate(self, chosen: dict[str, float | str]) -> Block:
        """The settings of the candidate that was chosen."""
        return self.named(chosen).of(self.features)

    def settle(self, chosen: dict[str, float | str]) -> Self:
        """The settings with that candidate alone, and each of its knobs as it was chosen."""
        candidate = self.named(chosen)
        return self.model_copy(update={"candidates": [candidate.under(settle(candidate.of(self.features), chosen))]})


def fit(cache: Cache, settings: Settings, seed: int) -> Fitted:
    """Raises UserError for several candidates or strengths and no val."""
    require_val(len(cache.images("val")), len(settings.points()), "candidates")
    best: tuple[tuple[float, float], Fitted] | None = None
    history: list[dict[str, float]] = []
    for place, candidate in enumerate(settings.candidates):
        fitted = FAMILY[candidate.method].fit(cache, candidate.of(settings.features), seed)
        [kept] = [row for row in fitted.history if all(row[knob] == value for knob, value in fitted.chosen.items())]
        seen = [kept] if candidate.method in LEAVING_OUT else fitted.history
        looks = [{"candidate": place, "val_loss": row["val_loss"], "val_accuracy": row["val_accuracy"]} for row in seen]
        history += [{"epoch": len(history) + step, **row} for step, row in enumerate(looks, start=1)]
        score = kept["val_accuracy"], -kept["val_loss"]
        if best is None or score > best[0]:
            method, transform = candidate.name
            chosen = {"probe": method, "transform": transform, **fitted.chosen}
            best = score, Fitted(fitted.model, history, chosen, fitted.epoch_seconds)
    assert best is not None
    return best[1]


def build(state: State, settings: Settings, classes: int) -> linear_probe.Probe:
    [candidate] = settings.candidates
    made: linear_probe.Probe = FAMILY[candidate.method].build(state, candidate.of(settings.features), classes)
    return made
