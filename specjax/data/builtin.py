"""Prompts that come with the library: short, of every kind, our own words."""

from __future__ import annotations

from specjax.io.prompts import Prompt

_CODE = '''def total_price(items):
    total = 0
    for item in items:
        total += item.price * item.quantity
    return total


def average_price(items):
    total = 0
    for item in items:
        total += item.price
    return total / len(items)
'''

_PASSAGE = (
    'The lighthouse at Carrow Point was built in 1874 after three ships were '
    'lost on the reef in a single winter. Its lamp burned whale oil at first, '
    'then paraffin, and was finally electrified in 1931. For fifty-seven '
    'years the keepers wrote the weather in a log book every four hours. '
    'Today those log books are used by climate scientists, because few '
    'places on that coast have an unbroken record of wind and temperature. '
    'The lighthouse itself has been automatic since 1988, and the keepers\' '
    'cottage is now a small museum.')

_ORDER = (
    'Hello, this is Maria Lindqvist. I would like to change my order 48213. '
    'Please send it to 17 Harbour Street, Kalmar, instead of the old '
    'address. You can reach me at maria.lindqvist@example.com. The order '
    'was placed on 3 March and has two desk lamps in it.')

# The four of the quickstart: chat, code edit, summary, extraction.
QUICKSTART: tuple[Prompt, ...] = (
    Prompt(id='summary', category='summarization', turns=(
        'Here is a passage:\n\n' + _PASSAGE + '\n\nFirst repeat the passage '
        'word for word, then summarise it in one sentence.',)),
    Prompt(id='code', category='coding', turns=(
        'Add a one-line docstring to each function, and write out the whole '
        'file again:\n\n```python\n' + _CODE + '```',)),
    Prompt(id='extract', category='extraction', turns=(
        'Read this message:\n\n' + _ORDER + '\n\nCopy these fields from it, '
        'one on each line: name, order number, new address, email.',)),
    Prompt(id='chat', category='writing', turns=(
        'Why does bread rise in the oven? Explain it in three sentences.',)),
)
