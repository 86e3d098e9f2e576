"""Every limit of merino-edge in one place. An error that applies a limit names this file.

The limits bound how much an untrusted file can make the tool allocate or loop over. None is a recommendation.
"""

from __future__ import annotations

from merino_edge.errors import InputError

MAX_VOCAB_SIZE = 1_000_000
MAX_POSITIONS = 1_048_576
MAX_WIDTH = 16_384
MAX_FFN_WIDTH = 131_072
MAX_HEAD_DIM = 512
MAX_HEADS = 1_024
MAX_TAPS = 16  # of a short convolution
MAX_BLOCKS = 256
MAX_LAYERS = 1_024  # in one block, and over all blocks
MAX_BLOCK_CHOICES = 50_000  # blocks a search space may choose from
MAX_ENUMERATED = 1_000_000  # architectures scored one by one
MAX_POINTS = 10_000  # of a Pareto front
MAX_TEMPLATES = 10_000  # combinations of what all blocks share
MAX_TEMPLATE_WIDTHS = 1_000_000
MAX_ITERATIONS = 1_000_000_000
MAX_POPULATION = 1_000_000
MAX_ITEMS = 1_000_000  # of an evaluation task
MAX_BATCH = 1_048_576  # sequences of a training step
MAX_SEED = 2**63 - 1

MAX_JSON_BYTES = 64 * 2**20  # of another program, as a tokenizer
MAX_JSON_VALUES = 8_000_000
MAX_ARTEFACT_BYTES = 32 * 2**20  # of our own JSON
MAX_ARTEFACT_VALUES = 2_000_000
MAX_JSON_DEPTH = 100
MAX_JSON_DIGITS = 300  # of a whole number; a float has no more
MAX_TABLE_BYTES = 64 * 2**20
MAX_SAMPLES = 1_000_000  # of all entries of a latency table
MAX_GRID_POINTS = 1_000_000  # of one grid of a latency table, measured or filled in
MAX_HEADER_BYTES = 16 * 2**20  # of a safetensors file
MAX_GGUF_FIELDS = 65_536  # and tensors
MAX_GGUF_STRINGS = 2 * 2**20  # of all arrays
MAX_LINE_CHARACTERS = 32 * 2**20  # of training text in JSON, a document or a conversation a line
MAX_UNPACKED_BYTES = 64 * 2**20  # of an .xz file, whatever its size
MAX_UNPACKED_RATIO = 200  # of a larger .xz file to its size; text has 3 to 20
MAX_EVALUATION_BYTES = 256 * 2**20  # of one evaluation set
MAX_SCORED_BYTES = 64 * 2**20  # of a text whose perplexity is asked for
MAX_SYSTEM_FILE_BYTES = 32 * 2**20  # of procfs, sysfs, the package database
MAX_LINE_BYTES = 64 * 2**10  # of tegrastats
MAX_PROMPT_BYTES = 1 * 2**20
MAX_REQUEST_BYTES = 4 * 2**20  # to the server; a prompt grows when JSON escapes it
MAX_GRAMMAR_CHARACTERS = 64 * 2**10  # of a JSON schema or a regular expression
MAX_MESSAGES = 1_024  # of a conversation sent to the server
MAX_TOOLS = 128  # that a request offers
MAX_CHOICES = 256  # answers to one request, of all its prompts
MAX_LOGPROBS = 20  # tokens beside the sampled one
MAX_WAITING = 10_000  # answers in the server's queue
MAX_SEQUENCES = 64  # answers that run at once
MAX_TEMPLATE_BYTES = 128 * 2**10
MAX_TEMPLATE_STEPS = 500_000  # turns of loops, calls, filters and operators while a chat template is rendered
MAX_TEMPLATE_VALUE = 16 * 2**20  # characters, about, of one value that it makes
MAX_TEMPLATE_MADE = 64 * 2**20  # characters, about, of all of them
MAX_TEMPLATE_SECONDS = 2.0  # of processor time
MAX_TOKEN_CHARACTERS = 16_384
MAX_ADDED_TOKENS = 200_000
MAX_MERGES = 2 * MAX_VOCAB_SIZE
MAX_WORD_CHARACTERS = 1_000  # of a word that WordPiece divides
MAX_TOKENIZER_STEPS = 64  # of a normalizer, a pre-tokenizer, a post-processor or a decoder
MAX_TOKENIZER_DEPTH = 8
MAX_TOKENIZER_SETTING = 8_192  # characters or parts of a setting
MAX_CHARSMAP_TEXT = 64  # bytes that a precompiled map puts in place of a character
MAX_TEXT_GROWTH = 65_536  # times that a tokenizer's steps may make a text longer, at most
MAX_NORMALIZED_BYTES = 16 * 2**20  # of a text after those steps, where it grows more than MOST_HARMLESS_GROWTH times
MOST_HARMLESS_GROWTH = 8
TOKENIZER_SECONDS, TOKENIZER_SECONDS_PER_MB = 3.0, 20.0  # to encode a text; a PC takes less than a second for a MB
MAX_NEW_TOKENS = 1_048_576
MAX_MODEL_STOPS = 32  # of a model, beside those of a request
MAX_STOP_STRINGS = 64
MAX_THREADS = 1_024
MAX_REPETITIONS = 10_000
MAX_MINUTES = 10_080  # of a profile: a week
MAX_WORKSPACE_MB = 1_048_576  # of a TensorRT build


def check_range(name: str, value: int, low: int, high: int, error: type = InputError) -> int:
    """Return `value`, or raise `error` naming the field and its bounds."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise error(f"{name} must be a whole number, not {value!r}", f"give {low} to {high}")
    if not low <= value <= high:
        raise error(f"{name} is {value}, outside {low} to {high}", "see merino_edge/limits.py")
    return value


def check_seconds(value: float | None) -> None:
    """Raise InputError for a time that is no positive number. None is accepted."""
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"--seconds is {value}", "give a positive number")
