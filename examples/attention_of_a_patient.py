"""What a model attends to in one patient, as figures and as a page for the browser.

    python examples/attention_of_a_patient.py --output attention/ --model classifier/

Without ``--model`` a small Med-BERT with random weights shows what the output looks like, and nothing else.
"""

import argparse
from datetime import datetime, timedelta
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from hf_ehr import EhrCodeTokenizer, MedBertConfig, MedBertModel
from hf_ehr.attention_maps import attention_map, attention_of
from hf_ehr.attention_page import attention_page

VISITS = {
    0: "I10 E78.5",
    116: "E11.9 I10 Z79.84",
    271: "E11.65 N18.30 I10 E66.9",
    465: "J18.9 I10 E11.65 N18.30 R09.02",
    698: "I50.9 I11.0 E11.22 N18.32",
    970: "I50.23 I11.0 J96.01 N17.9 E11.22",
    1280: "I50.22 N18.4 E11.22 D63.1",
    1629: "I50.23 I48.91 N18.4",
}
"""An invented patient: day of the visit → its ICD-10-CM diagnoses."""


def invented_record() -> dict:
    """The patient as a RECORD, of which only codes and dates are read."""
    return {
        "visits": [
            {
                "start": datetime(2019, 3, 4) + timedelta(days=day),
                "diagnoses": [f"ICD10CM/{code}" for code in codes.split()],
            }
            for day, codes in VISITS.items()
        ]
    }


def random_model(record: dict) -> tuple[MedBertModel, EhrCodeTokenizer]:
    """A small model that has learned nothing; its weights are large, so that its attention is not flat."""
    codes = dict.fromkeys(code for visit in record["visits"] for code in visit["diagnoses"])
    tokenizer = EhrCodeTokenizer.from_codes(list(codes))
    torch.manual_seed(0)
    return MedBertModel(MedBertConfig.tiny(vocab_size=len(tokenizer), initializer_range=0.2)), tokenizer


def main(arguments: list[str] | None = None) -> None:
    """Writes the figures and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("attention"), help="folder to write to")
    parser.add_argument("--model", help="folder of a Med-BERT checkpoint with its tokenizer")
    options = parser.parse_args(arguments)
    record = invented_record()
    if options.model:
        model, tokenizer = AutoModel.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    else:
        model, tokenizer = random_model(record)
    view = attention_of(model, tokenizer, record)
    attention_map(view, options.output / "layers.png")
    attention_map(view, options.output / "layer-1.png", layer=1)
    attention_page(view, options.output / "patient.html", title="Attention over one invented patient")
    print(f"Open {options.output / 'patient.html'} in a browser.")


if __name__ == "__main__":
    main()
