"""Writes the committed tiny checkpoints and their expected outputs: `python -m tests.models.freeze`.

Existing weights are kept; only a missing checkpoint is made anew. The outputs are always recomputed.
"""

import json

from tests.models.common import FIXTURES
from tests.models.test_behrt import TestBehrt
from tests.models.test_ehrbert import TestEhrBert
from tests.models.test_ehrconcat import TestEhrConcat, TestNoteClassification
from tests.models.test_ehrfusion import TestEhrFusion, TestEhrFusionText
from tests.models.test_ehrrnn import TestEhrRnn
from tests.models.test_ehrseries import TestEhrSeries
from tests.models.test_ehrtagger import TestEhrTagger
from tests.models.test_ehrtext import TestEhrText
from tests.models.test_gbert import TestGBert
from tests.models.test_medbert import TestMedBert, TestMedBertHeads, TestMedBertOptions
from tests.models.test_medhmp import TestMedHMP
from tests.models.test_medmplm import TestMedMPLM, TestMedMPLMCoding
from tests.models.test_visitrnn import TestVisitRnn

FAMILIES = (
    TestMedBert(),
    TestMedBertOptions(),
    TestMedBertHeads(),
    TestEhrRnn(),
    TestBehrt(),
    TestEhrBert(),
    TestEhrText(),
    TestEhrSeries(),
    TestEhrFusion(),
    TestEhrFusionText(),
    TestMedHMP(),
    TestGBert(),
    TestMedMPLM(),
    TestMedMPLMCoding(),
    TestVisitRnn(),
    TestEhrConcat(),
    TestNoteClassification(),
    TestEhrTagger(),
)


def main() -> None:
    for family in FAMILIES:
        folder = FIXTURES / family.fixture
        for head in family.heads:
            if not (folder / str(head)).is_dir():
                model = family.model(head, **family.frozen)
                model.save_pretrained(folder / str(head))
                for copied in (folder / str(head)).glob("*.py"):
                    copied.unlink()  # the code under test is the package's
        outputs = {str(head): family.frozen_output(head).tolist() for head in family.heads}
        (folder / "expected.json").write_text(json.dumps(outputs, indent=1) + "\n")


if __name__ == "__main__":
    main()
