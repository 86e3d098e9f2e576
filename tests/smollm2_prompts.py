"""Twenty prompts on which SmolLM2 is compared: prose, code, numbers, other scripts, white space."""

PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4,",
    "Water boils at",
    "In 1984, George Orwell",
    "naïve café, Straße, 日本語 😀",
    "The quick brown fox jumps over",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "To be, or not to be:",
    "SELECT name FROM",
    "My favourite colour is",
    "E = mc^2 means that",
    "a",
    "  \n\n\t ",
    "Dear Sir or Madam,\n\n",
    "3.14159265",
    "import numpy as np\nx = np.zeros(",
    "“Quoted” — and dashed…",
    "Paris Paris Paris Paris Paris Paris Paris Paris",
)
