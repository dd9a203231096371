"""BDHS as arXiv 2407.02477 writes it down, on transformers and torch: one forward pass a token, one row a sentence, nothing shared.

It knows the package's random draws (which numbers decide) and its choices where the paper leaves one, and none of its code but the
processor and the similarity.
"""

import hashlib
import io
import re

import jax
import numpy as np
import torch
import transformers
from helpers.checkpoints import quiet
from helpers.tiny import prompt_ids
from PIL import Image

YES_NO = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}


class Paper:
    def __init__(self, tiny, config, similarity):
        with quiet():
            self.torch = transformers.LlavaForConditionalGeneration.from_pretrained(tiny.directory, dtype=torch.float32).eval()
        self.processor, self.config, self.similarity = tiny.processor, config, similarity
        self.letter = int(tiny.processor.answer("a").ids[-2])

    @torch.no_grad()
    def generate(self, record, visible, context, stops, most):
        """Greedy tokens behind prompt and context, hidden image tokens being no key of any query in any layer."""
        prompt = prompt_ids(self.processor, record.turns)
        ids = [*prompt.tolist(), *(self.processor.answer(context).ids[:-1].tolist() if context else [])]
        is_image = np.isin(ids, self.processor.image_token_ids)
        media = [part.media for turn in record.turns for part in turn.parts if part.media is not None]
        embeds = self.torch.get_input_embeddings()(torch.tensor([ids])).clone()
        if media:
            pixels = np.stack([self.processor.pictures.pixels([Image.open(io.BytesIO(record.media[index].data))])[0] for index in media])
            pixels = (pixels / 255 - np.array(self.processor.mean)) / np.array(self.processor.std)
            out = self.torch.get_image_features(pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32))
            features = torch.cat(list(out.pooler_output)).reshape(-1, embeds.shape[-1])
            embeds[0, torch.tensor(is_image)] = features
        keys = np.ones(len(ids), np.int64)
        keys[is_image] = visible[: is_image.sum()]
        new = []
        while len(new) < most and (not new or new[-1] not in stops):
            seen = torch.tensor([*keys.tolist(), *[1] * len(new)], dtype=torch.bool)
            allowed = torch.tril(torch.ones(len(seen), len(seen), dtype=torch.bool)) & seen[None]
            if self.config.mask_scope == "text":  # image tokens see all image tokens before them
                of_image = torch.tensor([*is_image.tolist(), *[False] * len(new)])
                allowed |= torch.tril(of_image[:, None] & of_image[None])
            mask = torch.where(allowed | torch.eye(len(seen), dtype=torch.bool), 0.0, -1e30)[None, None]
            positions = torch.arange(len(seen))[None]
            hidden = self.torch.model.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
            logits = self.torch.lm_head(hidden.last_hidden_state[0, -1]).numpy()
            logits[list(self.processor.banned_ids)] = -np.inf
            new.append(int(np.argmax(logits)))
            embeds = torch.cat([embeds, self.torch.get_input_embeddings()(torch.tensor([[new[-1]]]))], dim=1)
        return new

    def text_behind(self, tokens):
        return self.processor.decode([self.letter, *tokens])[1:]

    def mask(self, record, draw, iteration):
        key = jax.random.split(jax.random.key(self.config.seed))[0]
        for number in (record_key(record), draw * self.config.n_iter + iteration, 0):
            key = jax.random.fold_in(key, number)
        return np.asarray(jax.random.uniform(key, (1000,))) >= self.config.rho_th

    def __call__(self, record, sentences, draw=0):
        """(rejected answer, iteration); `sentences` are those of the reference, the space in front of each included."""
        c, eos, reference = self.config, set(self.processor.eos_ids), record.responses[0].text
        space = reference[: len(reference) - len(reference.lstrip())], reference[len(reference.rstrip()) :]
        for iteration in range(1, c.n_iter + 1):
            visible = self.mask(record, draw, iteration)
            last = iteration == c.n_iter
            if not c.guided or (last and c.n_iter > 1):
                text = self.text_behind(self.generate(record, visible, "", eos, c.max_answer_tokens))
                rejected = space[0] + text.strip() + space[1]
                if last or self.similarity(rejected, reference) < c.eps:
                    return rejected, iteration
                continue
            out = []
            for number, sentence in enumerate(sentences):
                sequence = np.random.SeedSequence((c.seed, record_key(record), draw, iteration, number))
                random = np.random.Generator(np.random.Philox(sequence))
                before, behind = "".join(sentences[:number]), 0
                leading = re.match(r"\s*(Yes|yes|No|no)(?!\w)", sentence)
                if leading and random.random() < c.yes_no_swap:
                    word = YES_NO[leading[1]]
                    sentence = sentence[: leading.start(1)] + word + sentence[leading.end(1) :]
                    behind = leading.start(1) + len(word)
                starts = [word.start() for word in re.finditer(r"\S+", sentence) if word.start() >= behind]
                if behind and sentence[behind:].strip() and not sentence[behind].isspace():
                    starts = [behind, *starts]
                at = int(random.choice(sorted(starts)))
                context = (before + sentence[:at]).rstrip() if (before + sentence[:at]).strip() else ""
                new = self.generate(record, visible, context, {*eos, *self.processor.sentence_end_ids}, c.max_sentence_tokens)
                written = self.text_behind(new)
                if sentence[:at].strip():
                    out.append(sentence[:at].rstrip() + written)
                else:
                    out.append(sentence[:at] + written.strip() if written.strip() else "")
            rejected = space[0] + "".join(out).strip() + space[1]
            if c.n_iter == 1 or self.similarity(rejected, reference) < c.eps:
                return rejected, iteration
        raise AssertionError("the last iteration returns")


def record_key(record):
    return int.from_bytes(hashlib.sha256(record.id.encode()).digest()[:4], "little")
