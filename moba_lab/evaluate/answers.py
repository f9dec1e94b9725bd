"""Let a model answer greedily, and score what it wrote."""

import numpy as np
import torch

from moba_lab.evaluate.texts import SLACK
from moba_lab.tasks.scoring import string_recall


def scores(subject, questions, length, progress=iter):
    """Score the greedy answers of a model.

    Args:
        subject: `Subject`, its attention switched.
        questions: list of `Question`.
        length: tokens that prompt and answer may have.
        progress: function that wraps the questions, such as tqdm.

    Returns:
        dict: score, the mean of RULER's `string_recall`; score_se, its standard error;
        exact, the share of answers that begin with what is wanted and nothing more
        before the next space; prompt_tokens, mean; wanted and said, of the first
        answer that was not perfect, else the first.
    """
    recall, exact, sizes, shown = [], [], [], None
    for question in progress(questions):
        prompt = subject.ids(question.prompt)
        said = answer(subject, prompt, question, length)
        recall.append(string_recall(said, question.references))
        exact.append(matches(said, question.answer))
        sizes.append(len(prompt))
        if shown is None or (shown[0] == 1.0 and recall[-1] < 1.0):
            shown = recall[-1], question.answer, said
    n = len(recall)
    return {
        "samples": n,
        "score": float(np.mean(recall)),
        "score_se": float(np.std(recall, ddof=1) / n**0.5) if n > 1 else None,
        "exact": float(np.mean(exact)),
        "prompt_tokens": float(np.mean(sizes)),
        "wanted": repr(shown[1].strip()),
        "said": repr(shown[2][:200]),
    }


def matches(said, wanted):
    r"""Say whether an answer begins with the wanted one, as whole words.

    >>> matches(" 40712\n# more", "40712"), matches(" 407123", "40712")
    (True, False)
    >>> matches("12, 34.", " 12, 34\n"), matches("", "12")
    (False, False)
    """
    words = wanted.split()
    return said.split()[: len(words)] == words


@torch.no_grad()
def answer(subject, prompt, question, length):
    """Write the likeliest token again and again.

    Args:
        subject: `Subject`.
        prompt: list of token ids.
        question: `Question`, whose answer says how many tokens there may be.
        length: tokens that prompt and answer may have.

    Returns:
        str.
    """
    wanted = len(subject.ids(question.answer)) - len(subject.before) + SLACK
    model, room = subject.model, length - len(prompt)
    ids = torch.tensor([prompt], device=subject.place.device)
    ends = model.generation_config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max(1, min(wanted, room)),
        pad_token_id=first or 0,
    )
    new = written[0, len(prompt) :]
    return subject.tokenizer.decode(new, skip_special_tokens=True)
