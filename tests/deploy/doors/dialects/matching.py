"""Whether a grammar lets an output through, token by token."""

from llguidance import LLTokenizer

from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import compile_grammar


def accepts(grammar: Grammar, vocabulary: LLTokenizer, tokenizer: Tokenizer, output: str) -> bool:
    """The whole output may be written, and may end there."""
    matcher = compile_grammar(grammar, vocabulary)
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.encode(output)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()
