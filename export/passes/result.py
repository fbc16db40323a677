"""What every pass gives."""

from dataclasses import dataclass

from onnx import ModelProto


@dataclass(frozen=True)
class PassResult:
    """A model after a pass. A pass that finds something gives a subclass with fields of its own.

    Attributes:
        model: the changed model, or where the pass does not apply the one that it was given. That is never changed.
        notes: what a user should know of the change, a line each, to be read after the model's name.
        why_not: why the pass does not apply, in words; "" where it did.
    """

    model: ModelProto
    notes: tuple[str, ...] = ()
    why_not: str = ""

    def said_of(self, name: str) -> list[str]:
        """The notes, of a model of this name."""
        return [f"{name} {note}" for note in self.notes]
