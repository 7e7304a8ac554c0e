"""An environment with tools: arithmetic on decimals, with exact results."""

from __future__ import annotations

from decimal import Decimal


class Calculator:
    """Each public method is a tool; its type hints and its docstring are what the policy is told of it."""

    def reset(self) -> None:
        """Begins an episode. A calculator has nothing to say before it is used."""

    def add(self, a: float, b: float) -> str:
        """Adds two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their sum.
        """
        return shown(exact(a) + exact(b))

    def subtract(self, a: float, b: float) -> str:
        """Subtracts a number from another.

        Args:
            a: The number to subtract from.
            b: The number to subtract.

        Returns:
            The first minus the second.
        """
        return shown(exact(a) - exact(b))

    def multiply(self, a: float, b: float) -> str:
        """Multiplies two numbers.

        Args:
            a: The first number.
            b: The second number.

        Returns:
            Their product.
        """
        return shown(exact(a) * exact(b))

    def divide(self, a: float, b: float) -> str:
        """Divides a number by another.

        Args:
            a: The number to divide.
            b: The number to divide by.

        Returns:
            The first divided by the second, to 12 digits.
        """
        if b == 0:
            # what a tool raises is told to the policy
            raise ValueError("division by zero")
        return shown(round(exact(a) / exact(b), 12))


def exact(number: float) -> Decimal:
    """The decimal that was written: 0.1 is a tenth, not the nearest binary fraction."""
    return Decimal(repr(number))


def shown(number: Decimal) -> str:
    """The number without a trailing zero or an exponent, as `0.3`, `42`."""
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
