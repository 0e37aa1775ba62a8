"""Number types with a range. The command line checks the range."""

from typing import TYPE_CHECKING, TypeAlias

__all__ = ["BelowOne", "ImageExtent", "NonNegative", "NonNegativeInt", "Positive", "PositiveInt", "Share"]

if TYPE_CHECKING:
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    ImageExtent: TypeAlias = int
    Positive: TypeAlias = float
    NonNegative: TypeAlias = float
    Share: TypeAlias = float
    BelowOne: TypeAlias = float
else:

    def _restrict(name: str, kind: type, *rules: tuple[str, float]) -> type:
        try:
            from jsonargparse.typing import restricted_number_type
        except ImportError:  # only the command line needs jsonargparse
            return kind
        return restricted_number_type(name, kind, list(rules))

    _INFINITY = float("inf")
    PositiveInt = _restrict("PositiveInt", int, (">", 0))
    NonNegativeInt = _restrict("NonNegativeInt", int, (">=", 0))
    ImageExtent = _restrict("ImageExtent", int, (">=", 32))
    Positive = _restrict("Positive", float, (">", 0), ("<", _INFINITY))
    NonNegative = _restrict("NonNegative", float, (">=", 0), ("<", _INFINITY))
    Share = _restrict("ClosedUnitInterval", float, (">=", 0), ("<=", 1))
    BelowOne = _restrict("BelowOne", float, (">=", 0), ("<", 1))
