"""Errors that mean "the input is wrong": their message is complete, and the command line prints it without a
traceback."""


class UserError(Exception):
    """Something the caller gave cannot be used; the message says what, where, and what to do."""


class RewardError(UserError):
    """A reward function raised, or returned something that is not one finite number for each answer or token."""


class NonFiniteError(UserError):
    """A loss or gradient became NaN or infinite; the step was not taken, and the weights are as before it."""


class InvariantError(UserError):
    """A number of a run that is known in advance has another value: the run would learn something else."""
