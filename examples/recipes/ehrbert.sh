#!/usr/bin/env bash
# BERT-XML, tiny, on synthetic notes: bash examples/recipes/ehrbert.sh OUTPUT
set -euo pipefail
hf-ehr prepare-notes synthetic --output "$1/notes" --options '{"patients": 200, "codes": 12, "missed": 0.02, "codes_per_note": 3, "seed": 1}'
hf-ehr pretrain ehrbert --data "$1/notes" --max_length 128 --vocabulary word --vocab_size 500 --output_dir "$1/encoder" --preset tiny --model_options '{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 128}' --num_train_epochs 1 --learning_rate 3e-3 --save_strategy no --report_to none
hf-ehr finetune ehrbert --data "$1/notes" --max_length 128 --model "$1/encoder" --output_dir "$1/coder" --num_train_epochs 2 --learning_rate 1e-2 --report_to none
hf-ehr evaluate-coder --model "$1/coder" --output "$1/evaluation"
hf-ehr publish "$1/coder" --output "$1/ehrbert-synthetic-tiny"
