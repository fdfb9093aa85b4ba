"""The one exception that programs turn into a sentence instead of a traceback."""


class UserError(Exception):
    """Something the user can put right.

    The message is one clear sentence (or a few lines, one per problem) that says what is wrong, where (file,
    key, shard, rank) and what to do. Programs print it without a traceback and exit with code 2. Every other
    exception is a bug: it keeps its traceback and exits with code 1.
    """
