"""Faults of texts, tokenizers, models and their files."""

from __future__ import annotations

from faults.fault import Fault

TEXT = [
    Fault(
        "half-characters",
        "a stream gives out characters of which bytes are missing",
        "s2d_jax/text/tokenizer.py",
        r'return self.decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")',
        "return self.decode(ids)",
        "text/test_detokenizer.py",
    ),
    Fault(
        "stop-strings-begun",
        "a stream gives out what may be the beginning of a stop string",
        "s2d_jax/text/detokenizer.py",
        "text = text[: len(text) - self._held_back(text)]",
        "text = text[:]",
        "text/test_detokenizer.py",
    ),
    Fault(
        "words-taken-for-padding",
        "whatever one vocabulary has more than the other is taken for padding",
        "s2d_jax/text/pairing.py",
        "if i > shared and extra is not None and _PADDING.fullmatch(extra):",
        "if i > shared and extra is not None:",
        "text/test_pairing.py -k more_entries",
    ),
    Fault(
        "damaged-tokenizer-believed",
        "a damaged tokenizer.model is left to transformers, which takes it for tiktoken's",
        "s2d_jax/text/tokenizer_files.py",
        """    if not file.exists():
        return
    check_no_lfs""",
        """    if file.exists():
        return
    check_no_lfs""",
        "text/test_sentencepiece.py -k not_sentencepieces",
    ),
    Fault(
        "class-over-tokenizer-json",
        "a directory's tokenizer is rebuilt from the class that tokenizer_config.json names",
        "s2d_jax/text/tokenizer_files.py",
        """    if (directory / "tokenizer.json").exists():
        rebuilt""",
        """    if not (directory / "tokenizer_config.json").exists():
        rebuilt""",
        "text/test_directories.py -k counts_and_not_the_class",
    ),
    Fault(
        "code-of-a-directory",
        "Python code in a model's directory is run",
        "s2d_jax/text/tokenizer_files.py",
        "trust_remote_code=False",
        "trust_remote_code=True",
        "text/test_directories.py -k never_run",
    ),
    Fault(
        "pairs-by-entries-only",
        "tokenizers of equal entries pass, whatever they make of texts",
        "s2d_jax/text/pairing.py",
        "if ours != theirs:",
        "if len(ours) > 0 and not theirs:",
        "text/test_pairing.py -k another_pipeline",
    ),
    Fault(
        "two-beginnings",
        "a text that begins with BOS gets a second one",
        "s2d_jax/text/tokenizer.py",
        "return ids if ids[: len(before)] == before else [*before, *ids]",
        "return [*before, *ids]",
        "text/test_beginnings.py -k one_bos",
    ),
    Fault(
        "teachers-read-what-they-lack",
        "rows with tokens that a teacher has no embedding for are taken",
        "train/run/teachers.py",
        "    check_rows(rows, model.config.vocab_size, tokenizer, path)\n",
        "",
        "infer/test_commands_and_tokenizers.py -k beyond_an_embedding",
    ),
    Fault(
        "lists-of-other-rules",
        "a list is taken that was counted with a tokenizer of other rules",
        "s2d_jax/weights/vocabulary.py",
        "if self.behaviour_sha256 not in (None, behaviour_hash(tokenizer)):",
        "if self.behaviour_sha256 == '':",
        "infer/test_commands_and_tokenizers.py -k other_rules",
    ),
]

MODELS = [
    Fault(
        "queries-of-other-groups",
        "query heads share the keys of another group",
        "s2d_jax/model/attention.py",
        "q_BTNH.reshape(B, T, K, Q, H).transpose(0, 2, 3, 1, 4)",
        "q_BTNH.reshape(B, T, Q, K, H).transpose(0, 3, 2, 1, 4)",
        "model/test_model.py -k equals_numpy",
    ),
    Fault(
        "llama3-factors-ignored",
        "the RoPE scaling of Llama-3 is ignored",
        "s2d_jax/model/attention.py",
        "    if scaling is None:\n        return frequency",
        "    if scaling is None or scaling.factor > 1.0:\n        return frequency",
        "weights/test_load.py -k 'logits_equal and llama3'",
    ),
    Fault(
        "documents-see-back",
        "a packed document sees those before it",
        "s2d_jax/model/transformer.py",
        "(segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])",
        "(segment_ids_BT[:, :, None] >= segment_ids_BT[:, None, :])",
        "model/test_model.py -k segments",
    ),
    Fault(
        "parts-not-read",
        "drafting reads every exit through what all exits share",
        "s2d_jax/weights/model.py",
        "return Transformer(self.config, self.dtype, size, self.draft_config.parts)",
        "return Transformer(self.config, self.dtype, size)",
        "model/test_exit_parts.py -k follows_the_definition",
    ),
    Fault(
        "last-digit-lost",
        "int8 products leave out the second digit of the activations",
        "s2d_jax/model/products/forms.py",
        "(first_AO * 256 + last_AO) * step_A1",
        "(first_AO * 256) * step_A1",
        "model/test_weight_formats.py -k definition",
    ),
    Fault(
        "scales-split-like-inputs",
        "the scales of an int8 weight are split over devices as its inputs are",
        "s2d_jax/model/products/weight_formats.py",
        "jax.sharding.PartitionSpec(*sharding.spec[:1])",
        "jax.sharding.PartitionSpec(*sharding.spec[1:2])",
        "model/test_weight_formats.py -k onto_a_mesh",
    ),
    Fault(
        "weights-widened-once",
        "XLA may convert bf16 weights to f32 before the decoding loop, and hold both",
        "s2d_jax/model/products/forms.py",
        "tied, start = jax.lax.optimization_barrier((values, i * rows))",
        "tied, start = values, i * rows",
        "model/test_weight_formats.py -k no_f32_copy",
    ),
    Fault(
        "gguf-rows-interleaved",
        "the rows of q and k in a GGUF file are taken as they lie",
        "s2d_jax/weights/stored.py",
        "return weight if num_heads is None else unpermute_rope_rows(weight, num_heads)",
        "return weight",
        "formats/test_gguf.py -k reads_back",
    ),
]

FILES = [
    Fault(
        "cut-gguf-accepted",
        "a GGUF file may end inside its last tensor",
        "s2d_jax/formats/gguf_header.py",
        "if start + num_bytes > len(self.buffer):",
        "if start > len(self.buffer):",
        "formats/test_gguf.py -k truncated_file",
    ),
    Fault(
        "cut-safetensors-untold",
        "a truncated safetensors file ends in a traceback",
        "s2d_jax/formats/safetensors.py",
        "except (safetensors.SafetensorError, OSError) as error:",
        "except OSError as error:",
        "weights/test_load.py -k truncated_weights",
    ),
    Fault(
        "nan-accepted",
        "weights with NaN in them are loaded",
        "s2d_jax/formats/safetensors.py",
        "check_finite(name, array, self._paths[name])",
        "pass",
        "weights/test_broken_models.py -k a_model_with_nan",
    ),
    Fault(
        "shards-from-anywhere",
        "an index may name files outside the model's directory",
        "s2d_jax/formats/shards.py",
        'return not path.is_absolute() and ".." not in path.parts',
        "return True",
        "weights/test_broken_models.py -k names_nothing_outside",
    ),
    Fault(
        "parts-in-any-order",
        "a part of a GGUF file under the name of another is read",
        "s2d_jax/formats/gguf.py",
        "if own != (number, count):",
        "if own[1] != count:",
        "formats/test_gguf_damaged.py -k belong_together",
    ),
    Fault(
        "zeros-behind-the-vocabulary",
        "a padded vocabulary ends in rows of zeros",
        "s2d_jax/weights/pad_vocabulary.py",
        "more_VD = jnp.broadcast_to(table_VD[row], (count, table_VD.shape[1]))",
        "more_VD = jnp.zeros((count, table_VD.shape[1]), table_VD.dtype)",
        "weights/test_pad_vocabulary.py -k unused_token",
    ),
    Fault(
        "pissa-believed",
        "adapters whose beginning was taken out of the base are read as plain ones",
        "s2d_jax/weights/peft.py",
        "if not any(begun is plain or begun == plain for plain in _PEFT_PLAIN_BEGINNINGS):",
        "if False:",
        "model/test_lora.py -k files_that_cannot_be_read",
    ),
    Fault(
        "own-head-dropped",
        "a head that differs from the embedding is dropped where the config calls it tied",
        "s2d_jax/weights/stored.py",
        "if not np.array_equal(source.read(LM_HEAD.hf), source.read(EMBEDDING.hf)):",
        "if source.shapes[LM_HEAD.hf] != source.shapes[EMBEDDING.hf]:",
        "weights/test_load.py -k tied_head",
    ),
    Fault(
        "half-an-export-left",
        "an export that the disk refused leaves its half behind",
        "s2d_jax/weights/export.py",
        """    finally:
        shutil.rmtree(partial, ignore_errors=True)
""",
        "    finally:\n",
        "weights/test_export.py -k 'leaves_nothing and disk'",
    ),
    Fault(
        "earlier-export-lost",
        "an export that cannot be renamed takes the earlier one with it",
        "s2d_jax/weights/export.py",
        """            if old.exists():
                old.rename(out)
            raise""",
        "            raise",
        "weights/test_export.py -k failed_rename",
    ),
    Fault(
        "half-a-file-left",
        "a file that the disk refused is left under its temporary name",
        "s2d_jax/files.py",
        "partial.unlink(missing_ok=True)",
        "partial.exists()",
        "infer/test_infer_generate.py -k full_disk",
    ),
    Fault(
        "another-base-believed",
        "a draft takes any model under the name of its base",
        "s2d_jax/weights/load.py",
        "if not seen.matches(base.fingerprint):",
        "if not base.fingerprint:",
        "model/test_lora.py -k missing_or_another",
    ),
    Fault(
        "lora-scale-missing",
        "the adapters of PEFT are read without their scale",
        "s2d_jax/weights/peft.py",
        "factors[name.ours] = (a_RI, b_OR * np.float32(scale))",
        "factors[name.ours] = (a_RI, b_OR)",
        "model/test_lora.py -k there_and_back",
    ),
]
