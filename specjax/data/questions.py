"""A dozen questions to measure with where no benchmark file is at hand.

Our own words, short, spread over the kinds of work that speculation serves
differently: free writing (little to copy) to code edits (nearly everything).
Categories are named as in Spec-Bench where it has them.
"""

from __future__ import annotations

from specjax.io.prompts import Prompt

_FERRY = (
    'The ferry between Norvik and Sandholm will not run from Monday to '
    'Thursday next week, because its engine is being replaced. A smaller '
    'boat will carry passengers on foot at 7:00, 12:30 and 18:00. Cars must '
    'take the bridge at Elmstad, which adds about fifty minutes. Monthly '
    'tickets are valid on the bus over the bridge. The full timetable '
    'returns on Friday morning.')

_SOIL = (
    'Earthworms pull fallen leaves into their burrows and eat them there. '
    'What they leave behind is rich in nitrogen and phosphorus, in a form '
    'that roots can take up. Their burrows let air and rain into the ground: '
    'a meadow with many worms drains up to ten times faster than one '
    'without. Ploughing cuts worms and destroys burrows, so farmers who '
    'stop ploughing often see their number double within three years.')

_NOTES = (
    'Meeting of 12 May. Present: Ingrid Dahl, Tom Okafor, Wei Chen. The '
    'budget for the greenhouse is 18,400 euros. Tom orders the glass by 20 '
    'May. Ingrid asks the city for a permit. Wei draws the irrigation plan. '
    'Next meeting: 2 June, 15:00, room B204.')

_MANUAL_1 = (
    '[1] Descaling. When the red drop lights up, fill the tank with 500 ml '
    'of water and 100 ml of descaler. Hold the steam button for five '
    'seconds. The machine runs for twelve minutes. Rinse the tank, fill it '
    'with fresh water and press the coffee button once.')
_MANUAL_2 = (
    '[2] Milk. Clean the milk pipe every day: put its end into warm water '
    'and press the milk button for three seconds.')

_GLACIER_1 = (
    '[1] The Aldan glacier has lost 31 metres of thickness since 1960. Most '
    'of the loss happened after 1995.')
_GLACIER_2 = (
    '[2] Streams below the Aldan glacier carry most water in July. Farmers '
    'in the valley depend on them for their orchards.')

_COUNTER = '''class Counter:
    def __init__(self):
        self.counts = {}

    def add(self, word):
        if word in self.counts:
            self.counts[word] += 1
        else:
            self.counts[word] = 1

    def most_common(self):
        return max(self.counts, key=self.counts.get)
'''

_TEMPERATURE = '''def to_celsius(temperature):
    return (temperature - 32) * 5 / 9


def to_fahrenheit(temperature):
    return temperature * 9 / 5 + 32


def to_kelvin(temperature):
    return temperature + 273.15
'''


def _code(task: str, source: str) -> str:
  return f'{task}\n\n```python\n{source}```'


QUESTIONS: tuple[Prompt, ...] = (
    Prompt(id='1', category='chat', turns=(
        'Why do leaves turn red and yellow in autumn?',
        'Now explain it to a child of six, in two sentences.')),
    Prompt(id='2', category='chat', turns=(
        'Write a friendly invitation to a garden party on Saturday.',)),
    Prompt(id='3', category='summarization', turns=(
        f'Summarise this notice in two sentences:\n\n{_FERRY}',)),
    Prompt(id='4', category='summarization', turns=(
        f'What are the main points of this text?\n\n{_SOIL}',)),
    Prompt(id='5', category='extraction', turns=(
        f'Read these notes:\n\n{_NOTES}\n\nList who is present, the budget, '
        'who does what by when, and the next meeting.',)),
    Prompt(id='6', category='coding', turns=(_code(
        'Rename `counts` to `totals` everywhere and write out the whole '
        'class again:', _COUNTER),)),
    Prompt(id='7', category='coding', turns=(_code(
        'Add type hints to these functions and show the complete file:',
        _TEMPERATURE),)),
    Prompt(id='8', category='qa', turns=(
        'Which planets of the solar system have rings?',)),
    Prompt(id='9', category='rag', turns=(
        f'Answer from these passages only.\n\n{_MANUAL_1}\n\n{_MANUAL_2}\n\n'
        'Question: the red drop is lit. What must I do, step by step?',)),
    Prompt(id='10', category='rag', turns=(
        f'Answer from these passages only.\n\n{_GLACIER_1}\n\n{_GLACIER_2}'
        '\n\nQuestion: who is affected when the glacier shrinks, and why?',)),
    Prompt(id='11', category='math_reasoning', turns=(
        'A baker sells 24 rolls in the morning and half as many in the '
        'afternoon. Each roll costs 60 cents. How much does she earn that '
        'day? Show each step.',)),
    Prompt(id='12', category='translation', turns=(
        'Translate into French: The train to the coast leaves at eight, and '
        'we will have breakfast on board.',)),
)
