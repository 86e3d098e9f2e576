"""Documents of clients: fields by their exact types, no unknown ones, and errors that name the field."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from merino_edge.errors import InputError


class FieldError(InputError):
    """A field of a request cannot be used. `field` is its path, `code` a word for programs."""

    def __init__(self, field: str, message: str, code: str | None = None) -> None:
        super().__init__(f"{field}: {message}", "see docs/runtime.md")
        self.field, self.code = field, code


class Strict(BaseModel):
    """A document whose fields have exactly their types. What asks for nothing is accepted: null, and empty unknowns."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        """Clients send back what they were sent, with fields such as `"refusal": null` and `"annotations": []`."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: field
            for name, field in value.items()
            if field is not None and (name in known or field not in ("", [], {}))
        }


class Checked(Strict):
    """A whole request."""

    def check(self) -> None:
        """Raise FieldError for fields that do not go together."""
