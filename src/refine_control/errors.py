"""What a user can do wrong, named. Every message states the bad value and the mend."""


def printable(text: str) -> str:
    """Escapes what is not: an end of line, a command to the terminal, half a character."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UserError(ValueError):
    """A mistake in what the user gave us; the command line prints it in one line and exits with 2.

    Names of strangers' files stand in it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class Interrupted(BaseException):
    """The process was sent a signal (its number). Like KeyboardInterrupt no Exception: nothing that only looks for
    broken files may swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class RecipeError(UserError):
    """A recipe key or value that cannot be used."""


class DataError(UserError):
    """A folder, shard, image, mask or caption that cannot be read or does not fit."""


class ModelError(UserError):
    """A model folder that cannot be loaded, or models that do not belong together."""


def refusal(name: str, failed: str, error: Exception) -> ModelError:
    """One short line that names the model, of whatever a library raised. failed: what did, where the line lacks it."""
    reason = printable(" ".join(str(error).split())) or type(error).__name__
    return ModelError((reason if f"'{name}'" in reason else f"{failed} '{name}': {reason}")[:600])


class BusyError(UserError):
    """Another process is at work in a folder."""
