"""Answers to questions, judged as the benchmarks do: VQAv2 and TextVQA, A-OKVQA, ChartQA, ScienceQA."""

import re
from collections.abc import Sequence

# A contraction is also recognised where one of its apostrophes is left out. The table of the official evaluation has
# these words, and the one oddity below.
_CONTRACTIONS = (
    "'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't "
    "haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've "
    "must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't "
    "what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're "
    "why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
_NUMBERS = 'zero one two three four five six seven eight nine ten'
_REPLACED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, sign in enumerate(word) if sign == "'"
}
_REPLACED |= {"somebody'd": 'somebodyd', 'none': '0'} | {word: str(i) for i, word in enumerate(_NUMBERS.split())}
_ARTICLES = ('a', 'an', 'the')
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA = re.compile(r'\d,\d')
_PERIOD = re.compile(r'\.(?!\d)')
_PERIODS = 32  # how many the official code takes out: it passes a flag where the count belongs
# "a" before another word is an article: "The answer is a magnet."
_LETTER = re.compile(r'(?i:the answer is) \(?(?!a +\S)([A-Za-z])\b')


def normalise_vqa(answer: str) -> str:
    """The form in which answers of several people are compared (Antol et al. 2015; the official evaluation's rules).

    Lower case; punctuation goes, leaving a space where it stood between two characters and no digit,digit is about;
    full stops go unless a digit follows; no articles; 'none' and zero to ten as digits; contractions with their
    apostrophes. 'The dont-know, Two.' → "don't know 2".
    """
    glued = _DIGIT_COMMA.search(answer) is not None
    text = answer
    for sign in _PUNCTUATION:
        text = text.replace(sign, '' if glued or f'{sign} ' in answer or f' {sign}' in answer else ' ')
    words = (_REPLACED.get(word, word) for word in _PERIOD.sub('', text, count=_PERIODS).lower().split())
    return ' '.join(word for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, truths: Sequence[str]) -> float:
    """The official accuracy of VQAv2, TextVQA and VizWiz: right if three people said so, a third for each of fewer.

    Averaged over leaving each person out, as https://visualqa.org/evaluation.html says. Where all gave one answer,
    texts are compared as they stand, but for white space.
    """
    prediction, truths = _stripped(prediction), [_stripped(truth) for truth in truths]
    if len(set(truths)) > 1:
        prediction, truths = normalise_vqa(prediction), [normalise_vqa(truth) for truth in truths]
    right = [truth == prediction for truth in truths]
    return sum(min(1.0, (sum(right) - one) / 3) for one in right) / len(right)


def direct_answer(prediction: str, truths: Sequence[str]) -> float:
    """A-OKVQA's accuracy of direct answers: min(1, equal answers / 3), texts in lower case, nobody left out.

    Schwenk et al. 2022 (arXiv 2206.01718), section 5, as its evaluation code has it.
    """
    prediction = prediction.strip().lower()
    return min(1.0, sum(truth.strip().lower() == prediction for truth in truths) / 3)


def relaxed_accuracy(prediction: str, truths: Sequence[str], tolerance: float = 0.05) -> float:
    """ChartQA's accuracy (Masry et al. 2022, arXiv 2203.10244, section 5.1): numbers within 5 % of the truth are right.

    Numbers may be percentages, '5%' being 0.05. Other answers, and those to a truth of 0, must be equal but for case.
    """
    return max(float(_relaxed(prediction.strip(), truth.strip(), tolerance)) for truth in truths)


def choice_letter(text: str) -> str:
    """The option that an answer names, 'b' of 'The answer is (B).', or of 'B' alone; '' if none or several are named.

    Lu et al. 2022 (arXiv 2209.09513), ScienceQA: as its evaluation reads answers of the form 'The answer is X.'.
    """
    alone = text.strip().strip('().').lower()
    if len(alone) == 1 and alone.isalpha():
        return alone
    letters = {letter.lower() for letter in _LETTER.findall(text)}
    return letters.pop() if len(letters) == 1 else ''


def science_qa(prediction: str, truths: Sequence[str]) -> float:
    """1.0 if the answer names the option that a truth names. One that names none is wrong, where ScienceQA's own code
    guesses at random."""
    letter = choice_letter(prediction)
    return float(bool(letter) and letter in {choice_letter(truth) for truth in truths})


def _stripped(answer: str) -> str:
    return answer.replace('\n', ' ').replace('\t', ' ').strip()


def _relaxed(prediction: str, truth: str, tolerance: float) -> bool:
    number, target = _number(prediction), _number(truth)
    if number is not None and target:
        return abs(number - target) / abs(target) <= tolerance
    return prediction.lower() == truth.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip('%')) / 100 if text.endswith('%') else float(text)
    except ValueError:
        return None
