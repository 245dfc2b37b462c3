"""Steps that changed no weight, counted."""

from dataclasses import dataclass


@dataclass
class SkipCount:
    """Skipped steps of a run. The host knows of each at once: DeepSpeed has read the norm to decide."""

    in_a_row: int = 0
    """Skipped steps up to the newest one, without one between that was not."""
    total: int = 0
    """All skipped steps, those before a resume included."""

    def add(self, applied: bool) -> None:
        """Count a step."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        self.total += not applied
