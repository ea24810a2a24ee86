"""What a user can put right. The command line prints these as one message; every other exception keeps its traceback."""


class UserError(ValueError):
    """A configuration or an input that cannot be used; the message says what was expected, what came and what to do."""


class ConfigError(UserError):
    """An option that is unknown, missing, of the wrong type, or contradicts another."""


class DataError(UserError):
    """A data file that cannot be read as asked; lists every bad line as file:line: reason."""


class RewardError(UserError):
    """A reward that cannot be loaded, raised, or returned something that is not one number or None per completion."""


class CheckpointError(UserError):
    """State that cannot be saved or continued from."""


class Stopped(SystemExit):
    """A run ends because it was asked to, by a signal or an alarm; `code` is the process's exit code. No other SystemExit is one of ours."""


class SetupError(RuntimeError):
    """Something is missing on this machine: a device, a package, a compiler, a right, or a run directory that another process holds."""
