#!/usr/bin/env bash
# MedM-PLM, tiny, on synthetic visits of codes and notes: bash examples/recipes/medmplm.sh OUTPUT
set -euo pipefail
hf-ehr prepare synthetic_text_codes --output "$1/data" --options '{"patients": 400}'
hf-ehr pretrain medmplm --data "$1/data" --output_dir "$1/pretrained" --preset tiny --note_max_length 64 --note_vocab_size 300 --model_options '{"code_config": {"hidden_size": 16, "intermediate_size": 16}, "note_config": {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}}' --num_train_epochs 8 --learning_rate 3e-3 --save_strategy no --report_to none
hf-ehr finetune medmplm --data "$1/data" --model "$1/pretrained" --task readmission_30d --output_dir "$1/classifier" --num_train_epochs 5 --learning_rate 3e-3 --report_to none
hf-ehr evaluate --model "$1/classifier" --output "$1/evaluation"
hf-ehr publish "$1/classifier" --output "$1/medmplm-synthetic-tiny"
