"""What a dry run says: the plan of an attribution, and its text."""

from dataclasses import dataclass

from workbench.attribution import Settings


@dataclass(frozen=True)
class Sample:
    """A few facts that were scored to see what they cost."""

    facts: int
    passes: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """What an attribution will take.

    Attributes:
        settings: the definition of the scores.
        facts: facts that are to be done.
        done: facts that an earlier start has done.
        batches: facts are scored in so many groups.
        passes: forwards of the model.
        rows: token rows in all passes together.
        exact: whether passes and rows are counted; where the number of steps adapts they are extrapolated.
        result_bytes: the numbers of the whole result, uncompressed; at the command with the means over paraphrases.
        disk_bytes: what the whole result will take on disk.
        free_bytes: what is free there, or None where the result stays in memory.
        memory_bytes: the most that this process (on CUDA: the device) has held while measuring, the model included;
            None where the system does not say.
        seconds: from the first fact to the last, without opening the model.
        samples: what was measured.
    """

    settings: Settings
    facts: int
    done: int
    batches: int
    passes: int
    rows: int
    exact: bool
    result_bytes: int
    disk_bytes: int
    free_bytes: int | None
    memory_bytes: int | None
    seconds: float
    samples: tuple[Sample, ...]

    def __str__(self) -> str:
        """The plan in a few lines."""
        about = "" if self.exact else "about "
        measured = f"{sum(s.facts for s in self.samples)} facts in {_duration(sum(s.seconds for s in self.samples))}"
        free = "" if self.free_bytes is None else f", {_size(self.free_bytes)} free"
        left = self.disk_bytes * self.facts / max(1, self.facts + self.done)
        if self.free_bytes is not None and self.free_bytes < left:
            free += ": not enough"
        lines = [
            f"facts    {self.facts:,} to do in {self.batches:,} batches, {self.done:,} done before",
            f"passes   {about}{self.passes:,} of the model, {about}{self.rows:,} token rows",
            f"memory   {'unknown' if self.memory_bytes is None else _size(self.memory_bytes) + ' at most'}",
            f"disk     about {_size(self.disk_bytes)} ({_size(self.result_bytes)} of numbers){free}",
            f"time     about {_duration(self.seconds)}, measured on {measured}",
        ]
        return "\n".join(lines)


def _size(n_bytes: int | float) -> str:
    """Bytes in a unit that suits them.

    >>> _size(512), _size(1.5e6), _size(2**31)
    ('512 B', '1.5 MB', '2.1 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes:.0f} B"


def _duration(seconds: int | float) -> str:
    """Seconds in words.

    >>> _duration(3.21), _duration(190), _duration(7300)
    ('3.2 s', '3 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
