"""Normalisation of short answers, as in the VQA evaluation and in EvalAI's answer processor.

The word lists are those of GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py (BSD-2-Clause); mmf's
EvalAIAnswerProcessor, which LLaVA uses, has the same ones. Entries that change nothing are left out, and so are those
with a capital: words are in lower case by the time that they are looked up.
"""

import re
from functools import lru_cache

from lit_prune.evaluation.scorers.rule import total

ARTICLES = {"a", "an", "the"}
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTIONS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't havent:haven't
hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's isnt:isn't itd:it'd itd've:it'd've
it'dve:it'd've itll:it'll maam:ma'am mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've
mustnt:mustn't mustve:must've neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at
'ows'at:'ow's'at 'ow'sat:'ow's'at shant:shan't shed've:she'd've she'dve:she'd've shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd somethingd've:something'd've
something'dve:something'd've somethingll:something'll thats:that's thered:there'd thered've:there'd've
there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've they'dve:they'd've theyll:they'll
theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've we'dve:we'd've weve:we've werent:weren't
whatll:what'll whatre:what're whats:what's whatve:what've whens:when's whered:where'd wheres:where's whereve:where've
whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's whove:who've whyll:why'll whyre:why're whys:why's
wont:won't wouldve:would've wouldnt:wouldn't wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll
y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've
you'dve:you'd've youll:you'll youre:you're youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _CONTRACTIONS.split())
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official expression should also keep full stops after a digit, but uses a lookahead in place of a lookbehind.
FULL_STOP = re.compile(r"\.(?!\d)")
MOST_FULL_STOPS = 32  # the official code passes re.UNICODE, which is 32, where `sub` takes a count
CACHED = 1 << 16  # answers: most are given many times
THOUSANDS = re.compile(r"\d,\d")


def one_line(text: str) -> str:
    """Newlines and tabs as spaces, none at the ends."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(CACHED)
def normalise(text: str) -> str:
    """Normalise an answer as the VQA evaluation does: punctuation, then case, number words, articles, contractions."""
    return _plain_words(_without_punctuation(text))


@lru_cache(CACHED)
def evalai(text: str) -> str:
    """Normalise an answer as EvalAI's processor does: commas, question marks and possessives come first."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(one_line(text))


def _without_punctuation(text: str) -> str:
    # Decided on the text as it was: a mark that stands beside a space anywhere is removed everywhere.
    thousands = THOUSANDS.search(text) is not None
    plain = text
    for mark in PUNCTUATION:
        removed = thousands or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if removed else " ")
    return FULL_STOP.sub("", plain, count=MOST_FULL_STOPS)


def _plain_words(text: str) -> str:
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def leave_one_out(answers: list[str], answer: str) -> float:
    """Consensus accuracy in [0, 1]: each annotator in turn is left out, and min(1, matches / 3) of the others averaged.

    Args:
        answers: of all annotators, usually ten.
        answer: to compare with them, for equality.
    """
    same = answers.count(answer)
    return total(min(1.0, (same - (other == answer)) / 3) for other in answers) / len(answers)
