"""Load a model of transformers with its tokenizer, and switch its attention."""

import hashlib
import inspect
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import moba_fast.hf
from moba_fast.hf.settings import settings_of
from moba_fast.peers import first_line
from moba_lab.evaluate.options import SETTINGS
from moba_lab.place import PRECISIONS, Place

# Values of every tensor that tell a model's weights from others.
LOOKED_AT = 64
# Bytes of a token on average; a tokenizer without a vocabulary makes none at all.
LONGEST = 100


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and its tokenizer.

    name: folder or name on the hub.
    settings: block_size, topk, full_layers and decode of its MoBA.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    place: Place
    settings: dict

    @property
    def config(self):
        """Configuration of the text model."""
        return self.model.config.get_text_config(decoder=True)

    def switch(self, attention):
        """Let the model attend by MoBA or in full, as it did when it was loaded."""
        if attention == "moba":
            moba_fast.hf.enable(self.model, **self.settings)
        else:
            moba_fast.hf.disable(self.model)

    @cached_property
    def before(self):
        """Ids that the tokenizer puts before every text, such as the begin token's."""
        bare = self.tokenizer("a", add_special_tokens=False).input_ids
        whole = self.tokenizer("a").input_ids
        at = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare and bare]
        return whole[: at[0]] if at else []

    def ids(self, text):
        """Return the token ids of a text, what stands before every text included."""
        found = self.tokenizer(text, add_special_tokens=False, verbose=False)
        return [*self.before, *found.input_ids]

    def ids_and_bytes(self, text):
        """Return the token ids of a text, and how many of its bytes each stands for.

        Returns:
            ids: (n,) int64.
            sizes: (n,) float64; they add up to the bytes of the text as far as it is
                told. Of a tokenizer that does not tell which characters a token covers,
                all have the mean.
        """
        ids, size = np.array(self.ids(text)), len(text.encode())
        sizes = np.zeros(len(ids))
        own = sizes[len(self.before) :]
        if not getattr(self.tokenizer, "is_fast", False):
            own[:] = size / max(1, len(own))
            return ids, sizes
        spans = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        ).offset_mapping
        own[:] = sizes_of(text, spans)
        return ids, sizes

    @cached_property
    def bytes_per_token(self):
        """Bytes of a token of English and of source code, roughly."""
        text = inspect.getsource(inspect)[:20_000]
        return len(text) / max(1, len(self.ids(text)))

    @cached_property
    def fingerprint(self):
        """Short name of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.model.state_dict().items():
            flat = tensor.detach().reshape(-1)
            some = flat[:: max(1, len(flat) // LOOKED_AT)].double().cpu()
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(some.numpy().tobytes())
        return digest.hexdigest()[:12]


def sizes_of(text, spans):
    """Share the bytes of a text out among tokens.

    Of tokens that cover the same character, the first one gets all of it; what no
    token covers goes to the next one.

    Args:
        text: str.
        spans: list of (first, end) characters of every token; (0, 0) for none.

    Returns:
        (n,) int64.

    >>> sizes_of("é b", [(0, 1), (0, 1), (0, 0), (2, 3)]).tolist()
    [2, 0, 0, 2]
    """
    at = byte_offsets(text)
    return np.diff(np.maximum.accumulate([0, *(at[end] for _, end in spans)]))


def byte_offsets(text):
    """Return where every character of a text begins in UTF-8, and where it ends.

    >>> byte_offsets("aé!").tolist()
    [0, 1, 3, 4]
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + sum((codes >= limit).astype(int) for limit in (0x80, 0x800, 0x10000))
    return np.concatenate([[0], np.cumsum(sizes)]).astype(int)


def load(options, place):
    """Load what a command names, and see that it can be measured.

    Args:
        options: `Options`.
        place: `Place`.

    Returns:
        `Subject`, its attention full.

    Raises:
        ValueError: there is no such model, it has no tokenizer or another one's, a
            length is beyond its positions, or its attention cannot be switched.
    """
    name = options.model
    if name.endswith(".safetensors"):
        raise ValueError(
            f"expected a folder of save_pretrained or a hub name, got the file {name}; "
            f"write a model of this project in that format first: "
            f"python -m moba_lab.export {name} FOLDER"
        )
    config = tried(AutoConfig, name, f"a language model at {name}")
    check_lengths(config.get_text_config(decoder=True), options.lengths)
    where = options.tokenizer or name
    missing = (
        f"a tokenizer at {where}; save the model's own there with save_pretrained, or "
        f"name another place by --tokenizer"
    )
    tokenizer = tried(AutoTokenizer, where, missing)
    wanted = f"a causal language model at {name}"
    kind = PRECISIONS[place.precision]
    model = tried(AutoModelForCausalLM, name, wanted, dtype=kind)
    model = model.to(place.device).eval()
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        raise ValueError(
            f"expected a tokenizer of at most {known} tokens, as many as the model's "
            f"embedding has, got {len(tokenizer)} from {where}; name the model's own"
        )
    settings = settings_of(model.config.get_text_config(decoder=True))
    settings = {key: settings[key] for key in SETTINGS} | (options.settings or {})
    subject = Subject(name, model, tokenizer, place, settings)
    if subject.bytes_per_token > LONGEST:
        raise ValueError(f"expected {missing}; got: one that makes no tokens")
    check_switch(subject, options.attention)
    return subject


def tried(kind, name, wanted, **more):
    """Load something by name, or raise ValueError with what was expected."""
    try:
        return kind.from_pretrained(name, **more)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"expected {wanted}; got: {first_line(error)}") from error


def check_lengths(config, lengths):
    """Raise ValueError if a length is beyond the positions of a model."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max(lengths) > positions:
        raise ValueError(
            f"expected lengths of at most {positions} tokens, the positions of this "
            f"model (max_position_embeddings), got {max(lengths)}; leave it out, or "
            f"save the model with a longer position embedding first"
        )


def check_switch(subject, attention):
    """Raise ValueError if one of these ways to attend is not possible."""
    if "moba" not in attention:
        return
    try:
        subject.switch("moba")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the attention of this model cannot be switched to MoBA: {error}; "
            f"--attention full measures it as it is"
        ) from error
    subject.switch("full")
