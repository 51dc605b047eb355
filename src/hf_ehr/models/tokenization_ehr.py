"""Tokenizer of coded histories: one token per medical code, with visits and the order inside them as further streams.

The vocabulary is a WordLevel ``tokenizer.json``, so ``AutoTokenizer`` and the stock calls work on a string of codes
separated by spaces. Histories go past the text machinery, which joins and splits strings for nothing: ids are looked
up directly, in bulk for whole Arrow columns. The class defines no ``__init__``: transformers would then renumber the
vocabulary while loading.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib import import_module
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from .code_hierarchy import parent
from .ragged_visits import age_ids, check_lengths, day_ids, first_in_visit, ranks, tokens_kept, total_before

SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
NO_ID = -1
PIECE = 1_000_000  # strings that one thread looks up at a time


class EncodedColumn(NamedTuple):
    """Histories of many patients, one after the other; patient ``i`` owns ``offsets[i]:offsets[i + 1]``.

    Attributes:
        input_ids: Code ids, (tokens,) int32.
        visit_ids: Number of the visit within its patient from 1, (tokens,) int32.
        serial_ids: Rank of the code within its visit from 0, (tokens,) int32.
        offsets: Bounds of the patients, (patients + 1,) int64.
        age_ids: 1 + the age in whole years at the start of the visit, 0 where unknown, (tokens,) int32; ``None`` from
            a tokenizer without ``ages``.
        day_ids: 1 + the days from the first visit in the history to this one, 0 where unknown, (tokens,) int32;
            ``None`` from a tokenizer without ``days``.
    """

    input_ids: np.ndarray
    visit_ids: np.ndarray
    serial_ids: np.ndarray
    offsets: np.ndarray
    age_ids: np.ndarray | None = None
    day_ids: np.ndarray | None = None


class EhrCodeTokenizer(PreTrainedTokenizerFast):
    """Turns visits of ``VOCABULARY/CODE`` strings into ``input_ids``, ``visit_ids`` and ``serial_ids``.

    - A code outside the vocabulary takes the id of its nearest known ancestor (``E11.65`` → ``E11.6`` → ``E11``), else
      ``[UNK]``. The stock ``tokenizer("CODE CODE")`` call knows no back-off.
    - A visit keeps the first of codes with equal ids; visits without codes are not counted.
    - ``visit_ids`` start at 1 (0 is padding) and ``serial_ids`` at 0 in each visit.
    - Too long a history loses its oldest visits whole; only a newest visit that alone is too long is cut, behind its
      first ``max_length`` codes, the ones of highest priority. At most 999 visits stay (Med-BERT's visit table).

    BEHRT's input (Li et al. 2020) is two options kept with the vocabulary. ``visit_separators`` puts ``[CLS]`` before
    the first visit and ``[SEP]`` behind each; both belong to their visit and count towards ``max_length``, ``[CLS]``
    always stays. ``ages`` adds ``age_ids``. For models that read intervals (HiTANet), ``days`` adds ``day_ids``.

    Build one with :meth:`from_codes` or :func:`hf_ehr.vocabulary.fit_tokenizer`.

    Example:
        >>> tokenizer = EhrCodeTokenizer.from_codes(["ICD10CM/E11", "ICD10CM/I50.9"])
        >>> history = tokenizer.encode_patient([["ICD10CM/E11.65", "ICD10CM/I50.9"], ["ICD10CM/I50.9"]])
        >>> history["input_ids"], history["visit_ids"], history["serial_ids"]
        ([5, 6, 6], [1, 1, 2], [0, 1, 0])
        >>> tokenizer.decode_patient(history["input_ids"], history["visit_ids"])
        [['ICD10CM/E11', 'ICD10CM/I50.9'], ['ICD10CM/I50.9']]
    """

    model_input_names = ["input_ids", "visit_ids", "serial_ids", "attention_mask"]  # noqa: RUF012 - as in the base

    @classmethod
    def from_codes(cls, codes: Sequence[str], *, code_exact: bool = False, **state: Any) -> "EhrCodeTokenizer":
        """A tokenizer whose ids are the special tokens and then ``codes`` in the order given.

        Args:
            codes: The vocabulary, distinct, most frequent first by custom.
            code_exact: Ids of Med-BERT's published code: 0 is both padding and mask, codes start at 1. That vocabulary
                has no unknown token, so a code without a known ancestor is dropped from the history (and the stock
                call, which cannot drop, raises). The default keeps the two apart: ``[PAD]`` 0, ``[UNK]`` 1, ``[CLS]``
                2, ``[SEP]`` 3, ``[MASK]`` 4, codes from 5.
            **state: JSON-able facts kept in ``init_kwargs`` and ``tokenizer_config.json``; ``kinds`` names the code
                lists of a RECORD that :meth:`encode_patient` reads, ``visit_separators`` and ``ages`` are BEHRT's,
                ``days`` adds ``day_ids``.

        Raises:
            ValueError: A code occurs twice, is empty, or holds a space or the text of a special token; or
                ``code_exact`` is asked for separators, which that vocabulary does not have.
        """
        if code_exact and state.get("visit_separators"):
            raise ValueError("`visit_separators` must be False under `code_exact`: those ids have no [CLS] and [SEP].")
        named = {"pad_token": "[PAD]", "mask_token": "[PAD]"} if code_exact else SPECIAL_TOKENS
        tokens = [*dict.fromkeys(named.values()), *codes]
        _check_codes(codes, tokens)
        backend = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="[UNK]"))
        backend.pre_tokenizer = WhitespaceSplit()
        return cls(tokenizer_object=backend, truncation_side="left", **named, **state)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The code lists of a visit that histories are made of, in this order."""
        return tuple(self.init_kwargs.get("kinds", ("diagnoses",)))

    @property
    def visit_separators(self) -> bool:
        """Whether histories begin with ``[CLS]`` and each visit ends with ``[SEP]``."""
        return bool(self.init_kwargs.get("visit_separators", False))

    @property
    def ages(self) -> bool:
        """Whether histories have ``age_ids``."""
        return bool(self.init_kwargs.get("ages", False))

    @property
    def days(self) -> bool:
        """Whether histories have ``day_ids``."""
        return bool(self.init_kwargs.get("days", False))

    def codes_to_ids(self, codes: Any) -> np.ndarray:
        """Ids of ``codes`` with back-off, in bulk.

        Args:
            codes: A list, numpy array, polars Series or Arrow (Chunked)Array of strings. Of a dictionary-encoded
                (categorical) one only the dictionary is looked up, which is many times faster.

        Returns:
            (codes,) int32; -1 for an unknown code where the vocabulary has no ``[UNK]`` (``code_exact``).

        Raises:
            ValueError: ``codes`` holds a null or something that is no string.
        """
        if hasattr(codes, "to_arrow"):
            codes = codes.to_arrow()
        if hasattr(codes, "chunks"):
            chunks = [self.codes_to_ids(chunk) for chunk in codes.chunks]
            return np.concatenate(chunks) if chunks else np.empty(0, np.int32)
        if getattr(codes, "null_count", 0):
            raise ValueError(f"`codes` must not be null; {codes.null_count} are. Drop them first.")
        if hasattr(codes, "dictionary"):
            ids = import_module("pyarrow").array(self.codes_to_ids(codes.dictionary))
            return ids.take(codes.indices).to_numpy()  # in half of numpy's time
        if hasattr(codes, "to_pylist"):
            return self._arrow_strings_to_ids(codes)
        strings = codes.tolist() if isinstance(codes, np.ndarray) else codes
        return np.fromiter(map(self._ids.__getitem__, strings), np.int32, len(strings))

    def ids_in(self, other: "EhrCodeTokenizer") -> np.ndarray:
        """Where the tokens of this vocabulary stand in another one, e.g. that of a model to learn from.

        Returns:
            (vocabulary,) int64: the id of a code there with back-off, of a special token by its role; -1 for none.
        """
        ids = other.codes_to_ids(self.convert_ids_to_tokens(list(range(len(self))))).astype(np.int64)
        ids[np.isin(ids, other.all_special_ids)] = NO_ID
        ids[self.all_special_ids] = NO_ID
        # Med-BERT's own vocabulary has one id for padding and mask. The mask comes last: its row is what is read.
        for role in SPECIAL_TOKENS:
            mine, theirs = (getattr(tokenizer, f"{role}_id") for tokenizer in (self, other))
            if mine is not None and theirs is not None:
                ids[mine] = theirs
        return ids

    def encode_patient(
        self, visits: Sequence[Iterable[str]] | Mapping, *, max_length: int = 512, truncation: bool = True
    ) -> dict[str, list[int]]:
        """One history as equal-length lists.

        Args:
            visits: Lists of codes, oldest visit first, or a RECORD (a mapping with ``visits``). Ages and days come
                from the ``birth_time`` of a RECORD and the ``start`` of its visits; without them they are unknown.
            max_length: Most codes to keep.
            truncation: ``False`` keeps all codes (but never more than 999 visits).

        Returns:
            ``input_ids``, ``visit_ids``, ``serial_ids``, ``attention_mask``, each (codes,), with ``ages`` also
            ``age_ids`` and with ``days`` ``day_ids``.
        """
        encoded = self.encode_patients([visits], max_length=max_length, truncation=truncation)
        return {name: rows[0] for name, rows in encoded.items()}

    def encode_patients(
        self, patients: Iterable[Sequence[Iterable[str]] | Mapping], *, max_length: int = 512, truncation: bool = True
    ) -> dict[str, list[list[int]]]:
        """Several histories, unpadded: as :meth:`encode_patient`, one list per patient."""
        patients = list(patients)
        histories = [self._visits(patient) for patient in patients]
        visits = [visit for history in histories for visit in history]
        births, starts = _times(patients) if self.ages or self.days else (None, None)
        column = self.encode_column(
            [code for visit in visits for code in visit],
            [len(visit) for visit in visits],
            [len(history) for history in histories],
            max_length=max_length if truncation else None,
            birth_times=births,
            visit_starts=starts,
        )
        streams = column._asdict() | {"attention_mask": np.ones_like(column.input_ids)}
        bounds = list(pairwise(streams.pop("offsets")))
        return {
            name: [values[start:end].tolist() for start, end in bounds]
            for name, values in streams.items()
            if values is not None
        }

    def encode_column(
        self,
        codes: Any,
        visit_lengths: Any,
        patient_lengths: Any,
        *,
        max_length: int | None = 512,
        birth_times: np.ndarray | None = None,
        visit_starts: np.ndarray | None = None,
    ) -> EncodedColumn:
        """Histories of many patients at once, by the rules of :meth:`encode_patient` and without a loop over codes.

        Args:
            codes: All codes, patient after patient and visit after visit, as for :meth:`codes_to_ids`; (codes,).
            visit_lengths: Codes of each visit, (visits,).
            patient_lengths: Visits of each patient, oldest visit first, (patients,).
            max_length: Most codes to keep of a patient; ``None`` keeps all.
            birth_times: For ``ages``, (patients,) datetime64, NaT where unknown.
            visit_starts: For ``ages`` and ``days``, (visits,) datetime64, NaT where unknown.

        Raises:
            ValueError: The lengths do not add up, or ``max_length`` is below 1 (3 with separators).
        """
        ids = self.codes_to_ids(codes)
        visit_lengths, patient_lengths = np.asarray(visit_lengths, np.int64), np.asarray(patient_lengths, np.int64)
        separators = int(self.visit_separators)
        check_lengths(len(ids), visit_lengths, patient_lengths, max_length, least=1 + 2 * separators)
        visit = np.repeat(np.arange(len(visit_lengths)), visit_lengths)
        first = first_in_visit(ids, visit) & (ids != NO_ID)
        if not first.all():
            ids, visit = ids[first], visit[first]
            visit_lengths = np.bincount(visit, minlength=len(visit_lengths))
        # A separator is a token of its visit, and [CLS] takes one place of the patient.
        budget = None if max_length is None else max_length - separators
        counts = tokens_kept(visit_lengths + separators * (visit_lengths > 0), patient_lengths, budget)
        kept = np.maximum(counts - separators, 0)
        ids = ids[ranks(visit_lengths) < np.repeat(kept, visit_lengths)]
        ends = np.cumsum(patient_lengths)
        seen = total_before(counts > 0)
        numbers = seen[1:] - np.repeat(seen[ends - patient_lengths], patient_lengths)
        if separators:
            opens = (counts > 0) & (numbers == 1)
            counts = counts + opens
            ids = self._separated(ids, kept, counts, opens)
        return EncodedColumn(
            ids,
            np.repeat(numbers.astype(np.int32), counts),
            ranks(counts).astype(np.int32),
            np.append(0, total_before(counts)[ends]),
            np.repeat(age_ids(birth_times, visit_starts, patient_lengths), counts) if self.ages else None,
            np.repeat(day_ids(visit_starts, patient_lengths, counts), counts) if self.days else None,
        )

    def _separated(self, ids: np.ndarray, kept: np.ndarray, counts: np.ndarray, opens: np.ndarray) -> np.ndarray:
        """Codes with ``[CLS]`` before the visits that open a patient and ``[SEP]`` behind all, (tokens,) int32.

        Args:
            ids: (codes,).
            kept: Codes of each visit, (visits,).
            counts: Tokens of each visit, (visits,).
            opens: Which visits are a patient's first, (visits,).
        """
        tokens = np.full(counts.sum(), self.sep_token_id, np.int32)
        starts = total_before(counts)[:-1]
        tokens[starts[opens]] = self.cls_token_id
        tokens[np.repeat(starts + opens, kept) + ranks(kept)] = ids
        return tokens

    def decode_patient(self, input_ids: Any, visit_ids: Any) -> list[list[str]]:
        """The visits behind ``input_ids`` and ``visit_ids``, both (codes,); padding and separators are left out."""
        visits: dict[int, list[str]] = {}
        ids, numbers = np.asarray(input_ids), np.asarray(visit_ids)
        if self.visit_separators:
            codes = ~np.isin(ids, [self.cls_token_id, self.sep_token_id])
            ids, numbers = ids[codes], numbers[codes]
        for number, code in zip(numbers.tolist(), self.convert_ids_to_tokens(ids.tolist()), strict=True):
            if number:
                visits.setdefault(number, []).append(code)
        return list(visits.values())

    def save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """As in the base class, but the padding or truncation of an earlier call stays out of ``tokenizer.json``."""
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return super().save_pretrained(*args, **kwargs)

    @cached_property
    def _ids(self) -> "_CodeIds":
        return _CodeIds(self.get_vocab(), NO_ID if self.unk_token_id is None else self.unk_token_id)

    def _add_tokens(self, *args: Any, **kwargs: Any) -> int:
        self.__dict__.pop("_ids", None)
        return super()._add_tokens(*args, **kwargs)

    def _arrow_strings_to_ids(self, codes: Any) -> np.ndarray:
        """Hash join of an Arrow string array with the vocabulary; a short array is looked up string by string."""
        table = self._ids
        if 4 * len(codes) < len(table):
            return self.codes_to_ids(codes.to_pylist())
        compute = import_module("pyarrow.compute")
        if str(codes.type) == "string_view":  # the one kind that `index_in` does not take
            codes = codes.cast("string")

        def rows_of(piece: Any) -> Any:
            return compute.index_in(piece, value_set=table.as_arrow()[0])

        pieces = [codes.slice(start, PIECE) for start in range(0, len(codes), PIECE)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Arrow's look-up lets other threads run
            rows = list(pool.map(rows_of, pieces))
            partly = [(piece, found) for piece, found in zip(pieces, rows, strict=True) if found.null_count]
            for piece, found in partly:
                for code in compute.unique(piece.filter(found.is_null())).to_pylist():
                    table[code]  # looked up to be remembered
            if partly:
                rows = list(pool.map(rows_of, pieces))
            return np.concatenate(list(pool.map(lambda found: table.as_arrow()[1].take(found).to_numpy(), rows)))

    def _visits(self, patient: Sequence[Iterable[str]] | Mapping) -> list[list[str]]:
        visits = patient["visits"] if isinstance(patient, Mapping) else patient
        if any(isinstance(visit, str) for visit in visits):
            raise ValueError("A patient must be a list of visits, each a list of codes; got a list of strings.")
        return [
            [code for kind in self.kinds for code in visit[kind] or ()] if isinstance(visit, Mapping) else list(visit)
            for visit in visits
        ]


class _CodeIds(dict):
    """Code → id. A code asked for the first time takes its parent's id and is remembered."""

    def __init__(self, vocabulary: dict[str, int], unknown: int):
        # By id, which is by frequency: the codes met most lie together in memory, and the hash join finds them sooner.
        super().__init__(sorted(vocabulary.items(), key=itemgetter(1)))
        self.unknown = unknown
        self.arrow: tuple[Any, Any] | None = None

    def __missing__(self, code: str) -> int:
        if not isinstance(code, str):
            raise ValueError(f"`codes` must hold strings (VOCABULARY/CODE), got {type(code).__name__}.")
        above = parent(code)
        self[code] = index = self.unknown if above is None else self[above]
        return index

    def as_arrow(self) -> tuple[Any, Any]:
        """The codes and their ids as two Arrow arrays, made again when codes were added."""
        if self.arrow is None or len(self.arrow[0]) != len(self):
            # Whoever asks has pyarrow; an import statement would make the Hub's loader demand it of everybody.
            array = import_module("pyarrow").array
            self.arrow = array(list(self)), array(np.fromiter(self.values(), np.int32, len(self)))
        return self.arrow


def _check_codes(codes: Sequence[str], tokens: list[str]) -> None:
    if len(set(tokens)) < len(tokens):
        raise ValueError("`codes` must be distinct and none a special token. Remove the repeated ones.")
    for code in codes:
        if not code or any(character.isspace() for character in code):
            raise ValueError(f"`codes` must be neither empty nor hold white space, got {code!r}.")
        if any(special in code for special in SPECIAL_TOKENS.values()):
            raise ValueError(f"`codes` must not hold the text of a special token, got {code!r}.")


def _times(patients: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Births (patients,) and starts of all visits (visits,) of RECORDS, datetime64; NaT where a patient has none."""
    records = [patient if isinstance(patient, Mapping) else {"visits": patient} for patient in patients]
    visits = [visit for record in records for visit in record["visits"]]
    starts = [visit.get("start") if isinstance(visit, Mapping) else None for visit in visits]
    return np.array([record.get("birth_time") for record in records], "M8[us]"), np.array(starts, "M8[us]")


EhrCodeTokenizer.register_for_auto_class("AutoTokenizer")
