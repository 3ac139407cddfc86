"""BLEU, NIST, METEOR, ROUGE-L and CIDEr of generated texts, as the E2E challenge defines them.

BLEU and NIST are mteval-13a's, regardless of case; BLEU by sacrebleu. METEOR 1.5, ROUGE-L and CIDEr
are those of the COCO captions, by pycocoevalcap, which needs Java.
"""

from __future__ import annotations

import contextlib
import io
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec

from rosa.errors import UserError

Tokens = tuple[str, ...]
_LONGEST = 5
"""Words of the longest n-gram that NIST counts, as in mteval-13a."""


def e2e_scores(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The challenge's five scores: BLEU in percent, the others as its own scorer prints them.

    METEOR, ROUGE-L and CIDEr are left out, and that is said, where Java is missing.

    Args:
        predictions: a text for each input.
        references: for each input at least one text.

    Raises:
        ValueError: the numbers of inputs differ, or one has no reference.
    """
    if len(predictions) != len(references) or not all(references) or not predictions:
        raise UserError(
            f"{len(predictions)} predictions and {len(references)} inputs with references: there "
            "must be as many, and at least one reference for each"
        )
    scores = {"bleu": bleu(predictions, references), "nist": nist(predictions, references)}
    missing = [
        what
        for what, there in (
            ("Java", shutil.which("java")),
            ("pycocoevalcap (pip install 'rosa-finetune[e2e]')", find_spec("pycocoevalcap")),
        )
        if not there
    ]
    if missing:
        print(f"{' and '.join(missing)} not found: METEOR, ROUGE-L and CIDEr are left out")
        return scores
    return {**scores, **_coco(predictions, references)}


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU in percent (Papineni et al., 2002), with mteval-13a's tokens, in lower case."""
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    columns = [[texts[i] if i < len(texts) else None for texts in references] for i in range(most)]
    scorer = BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    return float(scorer.corpus_score(list(predictions), columns).score)  # type: ignore[arg-type]


def nist(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """NIST (Doddington, 2002): n-gram hits weighted by their information, of n up to 5.

    The information of an n-gram is log2 of how often the references hold its first n - 1 words,
    over how often they hold all n. Outputs shorter than the mean reference are penalised.
    """
    outputs = [_tokens(text) for text in predictions]
    answers = [[_tokens(text) for text in texts] for texts in references]
    seen = Counter(
        g for texts in answers for t in texts for n in range(1, _LONGEST + 1) for g in _ngrams(t, n)
    )
    seen[()] = sum(len(t) for texts in answers for t in texts)

    score = 0.0
    for n in range(1, _LONGEST + 1):
        information = 0.0
        for output, texts in zip(outputs, answers, strict=True):
            most = Counter()  # the clipped count: how often one reference holds it at most
            for text in texts:
                most |= Counter(_ngrams(text, n))
            hits = Counter(_ngrams(output, n)) & most
            information += sum(c * math.log2(seen[g[:-1]] / seen[g]) for g, c in hits.items())
        # Counted as mteval does: an output shorter than n takes away from the total.
        total = sum(len(output) - n + 1 for output in outputs)
        score += information / total if total > 0 else 0.0

    length = sum(map(len, outputs)) / sum(sum(map(len, t)) / len(t) for t in answers)
    if length <= 0:
        return 0.0
    # Half the score at two thirds of the references' mean length.
    beta = math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(beta * math.log(min(length, 1.0)) ** 2)


def _tokens(text: str) -> Tokens:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return tuple(Tokenizer13a()(text.lower()).split())


def _ngrams(tokens: Tokens, n: int) -> list[Tokens]:
    return [tokens[i : i + n] for i in range(len(tokens) - n + 1)]


def _coco(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """METEOR, ROUGE-L and CIDEr of the COCO captions, on its own tokens."""
    # The extra `e2e`: it need not be there.
    from pycocoevalcap.cider.cider import Cider  # type: ignore[import-not-found]
    from pycocoevalcap.meteor.meteor import Meteor  # type: ignore[import-not-found]
    from pycocoevalcap.rouge.rouge import Rouge  # type: ignore[import-not-found]
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer  # type: ignore[import-not-found]

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        tokenizer = PTBTokenizer()
        outputs = tokenizer.tokenize({i: [{"caption": t}] for i, t in enumerate(predictions)})
        answers = tokenizer.tokenize(
            {i: [{"caption": t} for t in texts] for i, texts in enumerate(references)}
        )
        scorers = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}
        return {
            name: float(scorer.compute_score(answers, outputs)[0])
            for name, scorer in scorers.items()
        }
