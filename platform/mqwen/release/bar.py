"""What an artifact must reach on held-out data before it is deployed anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

from mqwen.release.errors import ReleaseError


@dataclass(frozen=True)
class Bar:
    """`exact_match` (0 to 1) and `cider_d` (0 to 10) at least, `loss` at most; what is not given is not asked."""

    exact_match: float | None = None
    cider_d: float | None = None
    loss: float | None = None

    def check_given(self) -> None:
        """Raises ReleaseError for a bar that everything passes, or nothing can."""
        if self.exact_match is None and self.cider_d is None and self.loss is None:
            raise ReleaseError("no bar is given: at least one of --bar.exact-match, --bar.cider-d and --bar.loss")
        for option, value, most in (
            ("exact-match", self.exact_match, 1),
            ("cider-d", self.cider_d, 10),
            ("loss", self.loss, inf),
        ):
            if value is not None and not 0 <= value <= most:
                raise ReleaseError(f"--bar.{option} is {value}; 0 to {most} is allowed")

    def check(self, scores: Mapping[str, float]) -> None:
        """Raises ReleaseError that lists every score that misses the bar."""
        missed = [
            f"{name} is {scores[name]:.4f}, at least {least} is asked"
            for name, least in (("exact_match", self.exact_match), ("cider_d", self.cider_d))
            if least is not None and not scores[name] >= least  # also where a score is no number
        ]
        if self.loss is not None and not scores["loss"] <= self.loss:
            missed.append(f"loss is {scores['loss']:.4f}, at most {self.loss} is allowed")
        if missed:
            raise ReleaseError(f"below the bar, so nothing was deployed: {'; '.join(missed)}")
