"""The parts of a search-space file as pydantic models: what each key may hold.

`search_space` reads a file with them and builds the `SearchSpace`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tune_ego.errors import UserError

FORMS = ("choice", "grid", "uniform", "loguniform", "randint")
_LARGEST = 1e300
_SCHEDULER_SETTINGS = {
    "asha": ("grace", "reduction", "keep_stopped"),
    "median": ("grace", "least_trials", "keep_stopped"),
    "fifo": (),
}
"""Scheduler -> its settings."""


class Domain(NamedTuple):
    """The values that a key may take, and how one of them is drawn."""

    form: str
    """One of `FORMS`, or `value`."""
    values: tuple[Any, ...]
    """All values of a choice, grid or value; the two ends of a range."""


def _check_plain(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float, bool)) for item in items):
        raise ValueError("expected a number, a word, or a list of them")
    return value


def _check_range(ends: tuple[float, float]) -> tuple[float, float]:
    low, high = ends
    if max(abs(low), abs(high)) > _LARGEST:
        raise ValueError("the range is not finite")
    if not low < high:
        raise ValueError("the range is empty: expected [low, high]")
    return ends


def _check_pair(ends: Any) -> Any:
    if not isinstance(ends, (list, tuple)) or len(ends) != 2:
        raise ValueError("expected [low, high]")
    return ends


def _check_different(values: list[Any]) -> list[Any]:
    """Refuse equal values: each value of a grid is a trial of its own, and two equal ones would be the same trial."""
    seen: set[str] = set()
    for value in values:
        text = repr(float(value) if isinstance(value, int) and not isinstance(value, bool) else value)
        if text in seen:
            raise ValueError(f"the value {value!r:.40} is given twice")
        seen.add(text)
    return values


Plain = Annotated[Any, AfterValidator(_check_plain)]
Values = Annotated[list[Plain], Field(min_length=1)]
_Number = Annotated[float, Field(allow_inf_nan=True)]
Range = Annotated[
    tuple[_Number, _Number], Field(strict=False), BeforeValidator(_check_pair), AfterValidator(_check_range)
]
PositiveRange = Annotated[
    tuple[Annotated[_Number, Field(gt=0)], _Number],
    Field(strict=False),
    BeforeValidator(_check_pair),
    AfterValidator(_check_range),
]
WholeRange = Annotated[tuple[int, int], Field(strict=False), BeforeValidator(_check_pair), AfterValidator(_check_range)]


class _SpaceNode(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Entry(_SpaceNode):
    """One form with its values, and the conditions under which it holds."""

    when: dict[Any, Any] = {}
    """Key -> the value, or a list of the values, that it must have."""
    choice: Values = []
    grid: Annotated[Values, AfterValidator(_check_different)] = []
    uniform: Range = (0.0, 1.0)
    loguniform: PositiveRange = (0.1, 1.0)
    randint: WholeRange = (0, 1)
    value: Plain = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Entry:
        forms = self.model_fields_set - {"when"}
        if len(forms) != 1:
            raise ValueError(f"expected one of {', '.join((*FORMS, 'value'))}, beside an optional 'when'")
        return self

    @property
    def domain(self) -> Domain:
        (form,) = self.model_fields_set - {"when"}
        values = getattr(self, form)
        return Domain(form, (values,) if form == "value" else tuple(values))


class SchedulerEntry(_SpaceNode):
    """The settings of `search_space.SchedulerSettings`, as a file has them."""

    name: Literal["asha", "median", "fifo"] = "asha"
    grace: Annotated[int, Field(ge=1)] | None = None
    """None: `train.validate_every`."""
    reduction: int = Field(3, ge=2)
    least_trials: int = Field(3, ge=1)
    keep_stopped: bool = False

    @model_validator(mode="before")
    @classmethod
    def _has_settings_of_its_scheduler(cls, content: Any) -> Any:
        if isinstance(content, dict) and (name := content.get("name", "asha")) in _SCHEDULER_SETTINGS:
            for key in content:
                if key not in ("name", *_SCHEDULER_SETTINGS[name]):
                    settings = ", ".join(_SCHEDULER_SETTINGS[name]) or "none"
                    raise ValueError(f"unknown key 'scheduler.{key}'; the settings of {name}: {settings}")
        return content


class SpaceFile(_SpaceNode):
    """A search-space file: its top-level keys."""

    base: dict[Any, Any] = {}
    space: dict[Any, Any] = {}
    samples: int = Field(1, ge=1)
    repeats: int = Field(1, ge=1)
    searcher: Literal["random", "tpe"] = "random"
    scheduler: SchedulerEntry = SchedulerEntry()


_MESSAGES = {
    "dict_type": "expected keys and values",
    "model_type": "expected keys and values",
    "too_short": "the list is empty",
}
"""Type of a complaint of pydantic -> its text, where pydantic's names Python classes."""
Model = TypeVar("Model", bound=BaseModel)


def validated(model: type[Model], content: Any, place: str) -> Model:
    """Validate a part of a file. Raises `UserError` naming the place, the key and what is allowed."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{place}: {_describe_invalid(error, model)}") from error


def _describe_invalid(error: ValidationError, model: type[BaseModel]) -> str:
    """Return the first complaint of pydantic as `key: what is wrong, found ...`."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    message = _MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
    if first["type"] == "extra_forbidden":
        forms = model is Entry
        allowed = f"{', '.join(FORMS)}, or a plain value" if forms else ", ".join(model.model_fields)
        return f"unknown {'form' if forms else 'key'} {key!r}; allowed: {allowed}"
    if first["type"] == "value_error" and (not key or message.startswith("unknown key")):
        return message
    return f"{key and key + ': '}{message}, found {first['input']!r:.80}"
