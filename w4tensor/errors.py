"""The three refusals of the package: each says the rule, what was found, and the way out."""

from __future__ import annotations

__all__ = ["MisdispatchError", "PackingError", "Unsupported"]


class MisdispatchError(TypeError):
    """An int4 tensor reached an operator or a native int4 route that cannot read its bytes."""


class PackingError(ValueError):
    """Bytes are not in the layout that the reader expects: field, what it has, what it should."""

    def __init__(self, field: str, found: object, expected: object, hint: str = "") -> None:
        self.field, self.found, self.expected = field, found, expected
        super().__init__(f"{field} is {found}, expected {expected}" + (f"; {hint}" if hint else ""))


class Unsupported(ValueError):
    """A problem outside the documented domain: the rule, the two numbers, the way out."""
