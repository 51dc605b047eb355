"""Maps of code embeddings: vectors are the model's own, places keep what the method promises, chapters are right."""

from __future__ import annotations

import csv
import itertools

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from scipy.spatial.distance import pdist
from transformers import BertConfig

from hf_ehr import (
    EhrCodeTokenizer,
    GBertConfig,
    GBertForPreTraining,
    MedBertConfig,
    MedBertForMaskedLM,
    MedMPLMConfig,
    MedMPLMForICDCoding,
    MedMPLMModel,
)
from hf_ehr.cli.main import main
from hf_ehr.embedding_map import (
    TABLE_SCHEMA,
    chapters_of,
    code_vectors,
    embedding_figure,
    embedding_table,
    write_embedding_table,
)
from hf_ehr.models.processing_medmplm import MedMPLMProcessor

DIAGNOSES = [
    *("ICD10CM/E11.9", "ICD10CM/E11.65", "ICD10CM/E03.9", "ICD10CM/I50.9", "ICD10CM/I10", "ICD10CM/J44.9"),
    *("ICD9CM/250.00", "ICD9CM/428.0", "LOCAL/1"),
]
CHAPTERS = [
    *["ICD10CM/E00-E89"] * 3, *["ICD10CM/I00-I99"] * 2, "ICD10CM/J00-J99", "ICD9CM/240-279", "ICD9CM/390-459", "other",
]  # fmt: skip
DRUGS = ["ATC/A10BA", "ATC/A10AB", "ATC/C03CA", "ATC/R03BB"]


@pytest.fixture(scope="module")
def processor():
    return MedMPLMProcessor(
        EhrCodeTokenizer.from_codes(DIAGNOSES, kinds=["diagnoses"]),
        EhrCodeTokenizer.from_codes(DRUGS, kinds=["medications"]),
    )


def code_config(processor):
    tokens = [t.convert_ids_to_tokens(range(len(t))) for t in processor.code_tokenizers.values()]
    return GBertConfig.from_vocabularies(*tokens, hidden_size=16, intermediate_size=16)


def medmplm(processor, kind=MedMPLMModel):
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=30, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12)
    return kind(MedMPLMConfig(code_config=code_config(processor), note_config=bert))


def random_vectors(codes=DIAGNOSES, size=8, seed=0):
    return {"codes": (codes, np.random.default_rng(seed).normal(size=(len(codes), size)).astype(np.float32))}


def test_vectors_of_trees_are_what_the_encoder_reads_without_the_type(processor):
    model = medmplm(processor)
    vectors = code_vectors(model, processor.code_tokenizers)
    assert {kind: codes for kind, (codes, _) in vectors.items()} == {"diagnosis": DIAGNOSES, "medication": DRUGS}
    with torch.no_grad():
        model.code_encoder.type_embeddings.weight.zero_()
    for kind, number in (("diagnosis", 0), ("medication", 1)):
        embeddings = getattr(model.code_encoder, f"{kind}_embeddings")
        ids = torch.tensor([processor.code_tokenizers[kind].convert_tokens_to_ids(vectors[kind][0])])
        read = embeddings(ids, model.code_encoder.type_embeddings.weight[number])[0, 1:]
        np.testing.assert_allclose(vectors[kind][1], read.detach(), atol=1e-6)
    raw = model.code_encoder.diagnosis_embeddings.ontology.nodes[ids[0]].detach()
    assert np.abs(vectors["medication"][1] - raw.numpy()).max() > 1e-2, "the tree has left no trace"


def test_heads_show_their_base_and_a_coder_has_no_diagnoses(processor):
    torch.manual_seed(0)
    model = GBertForPreTraining(code_config(processor))
    for kind, (_, rows) in code_vectors(model, processor.code_tokenizers).items():
        np.testing.assert_array_equal(rows, code_vectors(model.base_model, processor.code_tokenizers)[kind][1])
    coder = medmplm(processor, MedMPLMForICDCoding)
    assert list(code_vectors(coder, processor.code_tokenizers)) == ["medication"]


def test_vectors_of_medbert_are_rows_of_its_table(processor):
    tokenizer = processor.diagnosis_tokenizer
    model = MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=len(tokenizer)))
    codes, rows = code_vectors(model, {"codes": tokenizer})["codes"]
    assert codes == DIAGNOSES
    ids = tokenizer.convert_tokens_to_ids(codes)
    np.testing.assert_array_equal(rows, model.get_input_embeddings().weight.detach()[ids])


def test_a_vocabulary_of_another_model_is_refused(processor):
    few = EhrCodeTokenizer.from_codes(DIAGNOSES[:4])
    for model in (medmplm(processor), MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=40))):
        with pytest.raises(ValueError, match=r"`tokenizers\['diagnosis'\]` must be the model's own, of \d+ tokens"):
            code_vectors(model, {"diagnosis": few})
    with pytest.raises(ValueError, match="must have embeddings of codes"):
        code_vectors(medmplm(processor, MedMPLMForICDCoding), {"diagnosis": processor.diagnosis_tokenizer})


def test_chapters_are_those_of_the_codes_with_their_names():
    assert chapters_of(DIAGNOSES) == CHAPTERS
    assert chapters_of([*DRUGS, "ATC/nonsense!", "NDC/0002"]) == ["ATC/A", "ATC/A", "ATC/C", "ATC/R", "other", "other"]
    table = embedding_table(random_vectors())
    names = dict(zip(table["chapter"].to_pylist(), table["chapter_name"].to_pylist(), strict=True))
    assert names["ICD9CM/390-459"] == "Diseases of the circulatory system"
    assert names["ICD10CM/E00-E89"].startswith("Endocrine, nutritional")
    assert names["other"] is None
    drugs = embedding_table(random_vectors(DRUGS))
    assert drugs["chapter_name"][2].as_py() == "Cardiovascular system"


def test_pca_keeps_a_plane_and_its_first_direction_has_the_largest_variance():
    rng = np.random.default_rng(0)
    plane, basis = rng.normal(size=(9, 2)) * [3, 1], np.linalg.qr(rng.normal(size=(6, 2)))[0]
    table = embedding_table({"codes": (DIAGNOSES, (plane @ basis.T + 5).astype(np.float32))})
    places = np.stack([table["x"], table["y"]], axis=1)
    np.testing.assert_allclose(pdist(places), pdist(plane), rtol=1e-4)
    np.testing.assert_allclose(places.mean(axis=0), 0, atol=1e-5)
    assert table["x"].to_numpy().var() > table["y"].to_numpy().var()


def test_tsne_keeps_groups_apart_and_a_seed_repeats_it():
    rng = np.random.default_rng(0)
    codes = [f"ICD10CM/{letter}{number}" for letter in "EIJ" for number in range(10, 30)]
    rows = np.repeat(10 * np.eye(3, 6), 20, axis=0) + rng.normal(size=(60, 6))
    tables = [embedding_table({"codes": (codes, rows)}, method="tsne", seed=seed) for seed in (0, 0)]
    assert tables[0].equals(tables[1])
    places = np.stack([tables[0]["x"], tables[0]["y"]], axis=1)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2) + np.eye(60) * 1e9
    nearest = distances.argmin(axis=1)
    assert (nearest // 20 == np.arange(60) // 20).all()


def test_each_kind_has_a_map_of_its_own(processor):
    vectors = code_vectors(medmplm(processor), processor.code_tokenizers)
    together = embedding_table(vectors)
    assert together.schema == TABLE_SCHEMA
    assert together["kind"].to_pylist() == ["diagnosis"] * len(DIAGNOSES) + ["medication"] * len(DRUGS)
    for kind, first in (("diagnosis", 0), ("medication", len(DIAGNOSES))):
        alone = embedding_table({kind: vectors[kind]})
        assert together.slice(first, alone.num_rows).equals(alone)


@pytest.mark.parametrize(
    ("vectors", "method", "message"),
    [
        (random_vectors(), "umap", "`method` must be one of pca, tsne, got 'umap'"),
        (random_vectors(DRUGS[:2]), "pca", "at least 3 codes, got 2"),
        ({"codes": (DRUGS, np.full((4, 3), np.nan))}, "pca", "must be finite"),
    ],
    ids=["method", "few", "nan"],
)
def test_what_cannot_be_mapped_is_refused(vectors, method, message):
    with pytest.raises(ValueError, match=message):
        embedding_table(vectors, method=method)


def test_the_figure_has_a_panel_a_kind_and_a_colour_and_mark_a_chapter(processor, tmp_path):
    table = embedding_table(code_vectors(medmplm(processor), processor.code_tokenizers))
    figure = embedding_figure(table, tmp_path / "map.png")
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Diagnosis", "Medication"]
    upper = figure.axes[0]
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert [label.split()[0] for label in labels] == sorted(set(CHAPTERS))
    drawn = {label.split()[0]: scatter.get_offsets() for label, scatter in zip(labels, upper.collections, strict=True)}
    for group, places in drawn.items():
        rows = [row for row, chapter in enumerate(CHAPTERS) if chapter == group]
        np.testing.assert_allclose(places, np.stack([table["x"], table["y"]], axis=1)[rows])
    with Image.open(tmp_path / "map.png") as image:
        assert image.format == "PNG"


def test_twenty_chapters_are_told_apart(tmp_path):
    codes = [f"ICD9CM/{number:03}" for number in range(1, 999, 7)]
    figure = embedding_figure(embedding_table(random_vectors(codes)), tmp_path / "map.png")
    looks = [
        (to_hex(scatter.get_facecolor()[0]), scatter.get_paths()[0].vertices.tobytes())
        for scatter in figure.axes[0].collections
    ]
    assert len(looks) == len(set(chapters_of(codes))) > 8
    assert all(one != other for one, other in itertools.combinations(looks, 2))


def test_the_csv_holds_every_code_once(tmp_path):
    table = embedding_table(random_vectors())
    write_embedding_table(table, tmp_path / "map.csv")
    with (tmp_path / "map.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["code"] for row in rows] == DIAGNOSES
    assert [row["chapter"] for row in rows] == CHAPTERS
    np.testing.assert_allclose([float(row["x"]) for row in rows], table["x"].to_numpy())
    np.testing.assert_allclose([float(row["y"]) for row in rows], table["y"].to_numpy())


def test_the_command_maps_checkpoints_of_three_families(processor, tmp_path, capsys):
    plain = processor.diagnosis_tokenizer
    torch.manual_seed(0)
    models = {
        "medmplm": (medmplm(processor, MedMPLMForICDCoding), processor, DRUGS),
        "gbert": (GBertForPreTraining(code_config(processor)), processor, DIAGNOSES + DRUGS),
        "medbert": (MedBertForMaskedLM(MedBertConfig.tiny(vocab_size=len(plain))), plain, DIAGNOSES),
    }
    for name, (model, vocabulary, codes) in models.items():
        folder, output = tmp_path / name, tmp_path / f"{name}-map"
        model.save_pretrained(folder)
        vocabulary.save_pretrained(folder)
        words = ["embedding-map", "--model", str(folder), "--output", str(output)]
        assert main([*words, "--method", "tsne" if name == "medbert" else "pca"]) == 0
        assert f"{len(DRUGS)} of medication" in capsys.readouterr().out or name == "medbert"
        with (output / "embedding_map.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["code"] for row in rows] == codes
        assert (output / "embedding_map.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--method", "umap"]) == 2
    assert "`method` must be one of" in capsys.readouterr().err
