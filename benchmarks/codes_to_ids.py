"""Goal G9: code strings to ids. Rivals and ours in one process, round by round, wall seconds on all cores.

    python benchmarks/codes_to_ids.py --codes 10000000

Floor: 40 M codes a second from strings; ambition: 300 M from a dictionary-encoded column.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ehr.models.tokenization_ehr import EhrCodeTokenizer

VOCABULARY = 82_603  # Med-BERT's
RIVALS = ("tokenizers fast call", "Python dict loop", "pyarrow index_in")
FAST_CALL_SHARE = 50  # the text call is so slow that a fiftieth of the codes has to do
CODES_IN_A_VISIT, VISITS_OF_A_PATIENT = 5, 8


def make_codes(count: int) -> tuple[list[str], pa.DictionaryArray]:
    """A vocabulary and a column whose frequencies fall as 1/rank."""
    letters = [chr(ord("A") + index) for index in range(26)]
    vocabulary = [f"ICD10CM/{letters[i % 26]}{i // 26 % 100:02d}.{i // 2600}" for i in range(VOCABULARY)]
    weights = 1 / np.arange(1, VOCABULARY + 1)
    drawn = np.random.default_rng(0).choice(VOCABULARY, count, p=weights / weights.sum()).astype(np.int32)
    return vocabulary, pa.DictionaryArray.from_arrays(drawn, pa.array(vocabulary))


def contenders(count: int) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name → (codes handled, what to run). Each rival's table is built once, outside the clock, as ours is."""
    vocabulary, encoded = make_codes(count)
    tokenizer = EhrCodeTokenizer.from_codes(vocabulary)
    column = encoded.cast(pa.string())
    strings = column.to_pylist()
    table = tokenizer.get_vocab()
    value_set = pa.array(list(table))
    visits = np.full(count // CODES_IN_A_VISIT, CODES_IN_A_VISIT)
    patients = np.full(len(visits) // VISITS_OF_A_PATIENT, VISITS_OF_A_PATIENT)
    few = strings[: count // FAST_CALL_SHARE]
    text = [" ".join(few[start : start + 100]) for start in range(0, len(few), 100)]
    return {
        "tokenizers fast call": (len(few), lambda: tokenizer(text)),
        "Python dict loop": (count, lambda: [table[code] for code in strings]),
        "pyarrow index_in": (count, lambda: pc.index_in(column, value_set=value_set)),
        "codes_to_ids, list": (count, lambda: tokenizer.codes_to_ids(strings)),
        "codes_to_ids, Arrow strings": (count, lambda: tokenizer.codes_to_ids(column)),
        "codes_to_ids, Arrow dictionary": (count, lambda: tokenizer.codes_to_ids(encoded)),
        "encode_column, Arrow dictionary": (
            count,
            lambda: tokenizer.encode_column(encoded, visits, patients),
        ),
    }


def main() -> None:
    """Prints millions of codes a second and the paired ratios to the rivals (medians over the rounds)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codes", type=int, default=10_000_000, help="codes in the column (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds; each runs every contender (default: %(default)s)"
    )
    arguments = parser.parse_args()
    whole = CODES_IN_A_VISIT * VISITS_OF_A_PATIENT
    competing = contenders(arguments.codes // whole * whole)
    rates: dict[str, list[float]] = {name: [] for name in competing}
    for _ in range(arguments.rounds):
        for name, (count, run) in competing.items():
            start = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - start) / 1e6)
    print(f"{'':34}{'M codes/s':>10}" + "".join(f"{f'x {rival}':>24}" for rival in RIVALS))
    for name, measured in rates.items():
        ratios = [median(own / other for own, other in zip(measured, rates[rival], strict=True)) for rival in RIVALS]
        print(f"{name:34}{median(measured):10.1f}" + "".join(f"{ratio:24.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
