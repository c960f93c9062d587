"""The three states of an image after a request: forgotten, not recognised before, still recognised."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from l2ul.deletion.report_schema import (
    AS_STORED,
    AS_USED,
    FORGOTTEN,
    NOT_RECOGNISED,
    NOT_REMOVED,
    NOTHING_TO_REMOVE,
    PARTLY_REMOVED,
    REMOVED,
    STILL_RECOGNISED,
    ImageRow,
    Report,
)


def state_of(met: bool, recognised: bool) -> str:
    """Return the state of an image.

    met         whether the unlearned model fulfils the request for the image: it predicts another class than the label,
                or the new label
    recognised  whether the original model predicted the label
    """
    if not met:
        return STILL_RECOGNISED
    return FORGOTTEN if recognised else NOT_RECOGNISED


def state(row: ImageRow) -> str:
    """Return the state of an image in a report of any version."""
    if "state" in row:
        return row["state"]
    recognised = row.get("was_called", row.get("called_before", row["label"]) == row["label"])
    return state_of(row.get("forgotten", True), recognised)


def was_recognised(row: ImageRow) -> bool:
    """Return whether the model recognised an image before the request of a report.

    Of an image that did not get its new label, the state does not say it: then its prediction decides.
    """
    if state(row) == STILL_RECOGNISED and row["new_label"] is not None:
        return row.get("was_called", True)
    return state(row) != NOT_RECOGNISED


@dataclass(frozen=True)
class Counts:
    """The number of images in each state, and of those not recognised before, how many an earlier request forgot.

    as_stored   of the recognised images, those that are forgotten as they are stored; None in reports without it
    as_used     likewise, those that are forgotten as they are used
    """

    forgotten: int
    not_recognised: int
    still_recognised: int
    forgotten_earlier: int = 0
    as_stored: int | None = None
    as_used: int | None = None

    def __len__(self) -> int:
        return self.forgotten + self.not_recognised + self.still_recognised

    @property
    def nothing_to_remove(self) -> bool:
        """Whether no image was recognised before this request or an earlier one, relabelled or not."""
        return not (self.forgotten or self.still_recognised or self.forgotten_earlier)

    @property
    def successful(self) -> bool:
        """Whether every image that was recognised is forgotten, and at least one was recognised."""
        return self.outcome == REMOVED

    @property
    def outcome(self) -> str:
        """The result of the request in a few words, one of `report_schema.OUTCOMES`."""
        if self.nothing_to_remove:
            return NOTHING_TO_REMOVE
        if not self.still_recognised:
            return REMOVED
        return PARTLY_REMOVED if self.forgotten or self.forgotten_earlier else NOT_REMOVED


def count(rows: Iterable[ImageRow]) -> Counts:
    """Count the states of the images in a report."""
    rows = list(rows)
    states = [state(row) for row in rows]
    unrecognised = [row for row, one in zip(rows, states, strict=True) if one == NOT_RECOGNISED]
    return Counts(
        *(states.count(one) for one in (FORGOTTEN, NOT_RECOGNISED, STILL_RECOGNISED)),
        sum(row.get("forgotten_earlier", False) for row in unrecognised),
        *(_number(rows, states, key) for key in ("forgotten_as_stored", "forgotten_as_used")),
    )


def _number(rows: Sequence[ImageRow], states: Sequence[str], key: str) -> int | None:
    """Return how many of the recognised images have a property; None if a row does not say."""
    if not all(key in row for row in rows):
        return None
    return sum(row[key] for row, one in zip(rows, states, strict=True) if one != NOT_RECOGNISED)


def headline(
    rows: Sequence[ImageRow], goal: str, also: Sequence[str] = (), counted: str | None = None, left_out: int = 0
) -> str:
    """Return the result of a request in one sentence: the outcome, then the number of images in each state.

    also      the changed copies that had to be forgotten too
    counted   what counts as forgotten: "as used" or "as stored"; None in reports of earlier versions
    left_out  the number of files that could not be read
    """
    unread = f"; {left_out} unreadable file{'s' * (left_out != 1)} left out" if left_out else ""
    counts, total = count(rows), images(len(rows))
    others = {AS_USED: f" ({counts.as_stored} as stored)", AS_STORED: f" ({counts.as_used} as used)"}
    how = f" {counted}{others[counted]}" if counted else ""
    copies = [f"as {one.upper()}" if one == "jpeg" else one for one in also]
    changed = f", also when {' or '.join(copies)}" if copies else ""
    if counts.nothing_to_remove:
        relabelled = f"; it predicts the new label of {len(counts)} now" if goal == "relabel" else ""
        return f"{counts.outcome}: the model recognised none of {total} before{changed}{relabelled}{unread}"
    was, still = ("was" if counts.not_recognised == 1 else "were"), ("is" if counts.still_recognised == 1 else "are")
    parts = f"{counts.not_recognised} {was} not recognised before"
    parts += f" ({counts.forgotten_earlier} forgotten by an earlier request)" if counts.forgotten_earlier else ""
    if goal == "relabel":
        met = len(counts) - counts.still_recognised
        return (
            f"{counts.outcome}: the model predicts the new label of {met} of {total}{changed}; {counts.forgotten} of "
            f"{len(rows)} are forgotten{how}, {parts}, {counts.still_recognised} {still} not relabelled{unread}"
        )
    verb = "is" if len(rows) == 1 else "are"
    return (
        f"{counts.outcome}: {counts.forgotten} of {total} {verb} forgotten{how}{changed}, {parts}, "
        f"{counts.still_recognised} {still} still recognised{f' {counted}' if counted == AS_USED else ''}{unread}"
    )


def images(number: int) -> str:
    """Return the number with the noun."""
    return f"{number} image{'s' * (number != 1)}"


def readable_time(made: str) -> str:
    """Return the time of a request, such as 2026-11-20T12:03:41+00:00, for readers: 2026-11-20 12:03 UTC."""
    return f"{made[:10]} {made[11:16]} UTC" if made.endswith("+00:00") else made


def recognised_images(reports: Iterable[Report]) -> set[tuple[str, int]]:
    """Return hashes, of files and of pixels, and labels of all images that the model recognised before a request."""
    rows = [row for report in reports for row in report["images"] if was_recognised(row)]
    return {(row[key], row["label"]) for row in rows for key in ("sha256", "pixels_sha256")}


def forgotten_images(reports: Iterable[Report]) -> set[tuple[str, int]]:
    """Return hashes, of files and of pixels, and labels of all images that a request made forgotten as stored."""
    rows = [row for report in reports for row in report["images"] if state(row) == FORGOTTEN or _as_stored_only(row)]
    return {(row[key], row["label"]) for row in rows for key in ("sha256", "pixels_sha256")}


def _as_stored_only(row: ImageRow) -> bool:
    """Return whether a request made an image forgotten as stored, but not as used, which the request demanded."""
    return state(row) == STILL_RECOGNISED and was_recognised(row) and row.get("forgotten_as_stored", False)
