/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the stages ask of an opened model: one description of its architecture, the same for every
 * family, and its tensors by (layer, kind). Families differ in this data, not in the code of a
 * stage. Everything here is fixed when the model is opened, except that files are opened and mapped
 * when a tensor in them is first asked for.
 */
#ifndef AFD_LIB_MODEL_H
#define AFD_LIB_MODEL_H

#include <stdbool.h>
#include <stdint.h>

#include <afd/model.h>

#include "../context/core.h"

/* ---- the architecture ---- */

enum afd__attention_kind { AFD__ATTENTION_FULL = 1, AFD__ATTENTION_SLIDING };
/* Per head: one weight vector [head_dim] for all heads. */
enum afd__qk_norm { AFD__QK_NORM_NONE = 1, AFD__QK_NORM_PER_HEAD };
/* Elementwise: sigmoid(x Wg^T), [n_heads * head_dim]. */
enum afd__output_gate { AFD__OUTPUT_GATE_NONE = 1, AFD__OUTPUT_GATE_ELEMENTWISE };

/* The slots where a layer may have a norm. Before a block it is fed by the residual stream; after
 * it, by the block's output and ahead of the addition. */
enum afd__norm_slot {
	AFD__NORM_BEFORE_ATTENTION = 1,
	AFD__NORM_AFTER_ATTENTION = 2,
	AFD__NORM_BEFORE_FFN = 4,
	AFD__NORM_AFTER_FFN = 8,
};

/* One table of rotation; layers share it. Rotation is half-split: pairs (d, d + head_dim / 2). */
struct afd__rope {
	float *inv_freq; /* [head_dim / 2] */
	float scale;     /* of cos and sin: YaRN's attention factor, else 1 */
	uint32_t head_dim;
};

/* scores -> the top_k experts of a row and their weights, all in float32. Equal scores take the
 * lower id. */
struct afd__router {
	int32_t score;         /* enum afd_router: softmax over all experts, or sigmoid */
	bool bias;             /* [n_experts], added for the selection only */
	bool normalize;        /* weights divided by their sum + epsilon */
	float epsilon;         /* 0 or 1e-20 */
	float scale;           /* of the weights, last */
	uint32_t n_groups, top_groups; /* DeepSeek's grouped selection (a group scores the sum of
					  its two best); 1, 1: none */
};

struct afd__layer {
	int32_t attention;            /* enum afd__attention_kind */
	uint32_t window;              /* positions that a row sees, its own included; 0: all */
	uint32_t n_heads, n_kv_heads, head_dim;
	float softmax_scale;
	const struct afd__rope *rope; /* NULL: no rotation */
	int32_t qk_norm;              /* enum afd__qk_norm */
	int32_t output_gate;          /* enum afd__output_gate */
	bool attention_bias;          /* q, k, v and o have one */
	uint32_t norms;               /* enum afd__norm_slot, or-ed */
	int32_t ffn_kind;             /* enum afd_ffn_kind */
	int32_t activation;           /* enum afd_activation */
	uint32_t intermediate_size;   /* of a dense FFN */
	/* of a routed FFN */
	uint32_t n_experts, top_k;
	uint32_t expert_size;         /* width of one expert */
	uint32_t shared_size;         /* width of the shared experts, as one MLP; 0: none */
	struct afd__router router;
};

struct afd__arch {
	const char *name, *model_type; /* "Qwen3ForCausalLM", "qwen3"; static */
	bool ffn_only; /* attention of this family is not computed: nothing of it is filled in */
	uint32_t hidden_size, n_layers, vocab_size;
	uint32_t max_position_embeddings; /* 0: not said */
	float rms_norm_eps;
	float embedding_scale;
	bool tied_head;
	int32_t config_dtype;      /* enum afd_dtype; 0: not said */
	struct afd__layer *layers; /* [n_layers] */
	uint8_t *ffn_kinds;        /* [n_layers] */
	struct afd__rope rope;
};

/* ---- tensors ---- */

enum afd__tensor_kind {
	/* of no layer */
	AFD__TENSOR_EMBED = 1,   /* [vocab][hidden] */
	AFD__TENSOR_FINAL_NORM,  /* [hidden] */
	AFD__TENSOR_HEAD, /* [vocab][hidden]; of a tied model the very tensor of EMBED,
			     unless the file has another one */
	/* of a layer, attention */
	AFD__TENSOR_INPUT_NORM,  /* [hidden], AFD__NORM_BEFORE_ATTENTION */
	AFD__TENSOR_Q,           /* [n_heads * head_dim][hidden] */
	AFD__TENSOR_K,           /* [n_kv_heads * head_dim][hidden] */
	AFD__TENSOR_V,
	AFD__TENSOR_Q_BIAS,      /* [n_heads * head_dim]; these four only with attention_bias */
	AFD__TENSOR_K_BIAS,
	AFD__TENSOR_V_BIAS,
	AFD__TENSOR_Q_NORM,      /* [head_dim]; these two only with qk_norm */
	AFD__TENSOR_K_NORM,
	AFD__TENSOR_O,           /* [hidden][n_heads * head_dim] */
	AFD__TENSOR_O_BIAS,      /* [hidden] */
	AFD__TENSOR_FFN_NORM,    /* [hidden], AFD__NORM_BEFORE_FFN */
	/* of a layer, FFN */
	AFD__TENSOR_GATE,        /* [intermediate][hidden] */
	AFD__TENSOR_UP,          /* [intermediate][hidden] */
	AFD__TENSOR_DOWN,        /* [hidden][intermediate] */
	/* added by families */
	AFD__TENSOR_OUTPUT_GATE, /* [n_heads * head_dim][hidden], AFD__OUTPUT_GATE_ELEMENTWISE */
	AFD__TENSOR_AFTER_ATTENTION_NORM, /* [hidden], AFD__NORM_AFTER_ATTENTION */
	AFD__TENSOR_AFTER_FFN_NORM,       /* [hidden], AFD__NORM_AFTER_FFN */
	AFD__TENSOR_ROUTER,      /* [n_experts][hidden]; both roles may ask for it */
	AFD__TENSOR_ROUTER_BIAS, /* [n_experts] */
	AFD__TENSOR_SHARED_GATE, /* [shared_size][hidden] */
	AFD__TENSOR_SHARED_UP,
	AFD__TENSOR_SHARED_DOWN, /* [hidden][shared_size] */
	AFD__TENSOR_EXPERT_GATE, /* [expert_size][hidden]; these three by afd__model_expert(), also
				    out of fused 3-D tensors */
	AFD__TENSOR_EXPERT_UP,
	AFD__TENSOR_EXPERT_DOWN, /* [hidden][expert_size] */
	AFD__TENSOR_K_SCALE, /* one number; these two by afd__model_kv_scales(), where the
				checkpoint has them */
	AFD__TENSOR_V_SCALE,
};

enum { AFD__SCALE_BLOCK = 128 };

/*
 * Scales of an e4m3 tensor: value = number * scale[(row_offset + row) / 128][column / 128].
 * row_offset is 0 unless the tensor is the up half of a fused one that does not begin on a block.
 */
struct afd__scales {
	const void *data;        /* [rows][columns], aligned to a number; NULL: not asked for */
	uint64_t bytes;
	uint32_t rows, columns; /* ceil((row_offset + shape[0]) / 128), ceil(shape[1] / 128); 0:
				   there are none */
	uint32_t row_offset;     /* 0 .. 127 */
	const char *name;        /* as the checkpoint has it, for errors */
	int32_t dtype;           /* AFD_DTYPE_F32, _BF16 or _F16 */
};

struct afd__tensor {
	const char *name; /* the canonical one, also of a slice of a fused tensor; lives as long as
			     the model */
	const char *file; /* NULL: lent by the host */
	const void *data; /* mapped or lent, read-only; aligned to 4 bytes, a slice of a fused
			     tensor to a number */
	uint64_t bytes;
	uint64_t shape[4]; /* [n_dims] */
	uint32_t n_dims;
	int32_t dtype; /* AFD_DTYPE_F32, _BF16, _F16, or _FP8 with scales; tensors of one layer may
			  differ */
	struct afd__scales scales; /* of _FP8; zeros otherwise */
	bool mapped;       /* data lies in a mapped file */
};

/* How a matrix lies in the checkpoint. */
enum afd__form {
	AFD__FORM_APART = 1, /* a tensor of its own */
	AFD__FORM_STACK,     /* one of [n_experts] in a 3-D tensor */
	AFD__FORM_GATE_UP,   /* half of one of [n_experts]: gate, then up */
};

/* Of the router and its bias: attention needs them only when it routes. */
enum { AFD__ROLE_BOTH = AFD_ROLE_ATTENTION | AFD_ROLE_FFN };

/* A matrix or vector that a role needs, as the architecture has it. */
struct afd__slot {
	char name[64]; /* canonical: how a checkpoint that stores each matrix apart spells it */
	const char *stored; /* its name in the checkpoint, or that of the tensor that it is a slice
			       of; NULL: not there */
	const char *scales; /* the name of its scales; NULL: not there */
	int32_t kind;       /* enum afd__tensor_kind */
	int32_t layer;      /* -1: of none */
	int32_t expert;     /* -1: of none */
	uint8_t role;       /* enum afd_role, or-ed */
	uint8_t form;       /* enum afd__form */
	uint8_t n_dims;
	uint8_t size_names[2]; /* keys of config.json, for errors: afd__size_name() */
	uint64_t shape[2];  /* [n_dims] */
};

/* A tensor of the checkpoint, once: a fused one has several slots. */
struct afd__listed {
	uint32_t slot;
	bool scales; /* the slot's scales */
};

/* A tied model may ship a head of its own; whether it differs is found out when somebody asks. */
enum afd__head { AFD__HEAD_UNKNOWN, AFD__HEAD_SHARED, AFD__HEAD_OWN };

struct afd_model {
	struct afd_context *ctx;
	struct afd__arch arch;
	struct afd__checkpoint *checkpoint;
	struct afd__slot *slots; /* [n_slots], in the order of use */
	struct afd__layer_slots {
		uint32_t first, experts; /* experts: 3 slots each, gate, up, down */
	} *layer_slots;              /* [n_layers + 1]; the last one ends the layers */
	struct afd__listed *listed;  /* [n_listed] */
	uint32_t n_slots, n_listed;
	int32_t weights; /* enum afd_weights */
	_Atomic int head; /* enum afd__head of a tied model */
};

/* -EINVAL for NULL or in a child of fork: every public function that takes a model begins with
 * it. */
int afd__model_check(const struct afd_model *model);

/* -ENOTSUP when the stage of that role is not computed for this family. */
int afd__model_check_role(const struct afd_model *model, int32_t role);

/*
 * The tensor of a kind, its shape checked; layer -1 for those of none. A kind that the architecture
 * does not have there is a mistake of the caller (assert). Opens and maps the tensor's file when
 * needed. Any thread.
 *
 *   -ENOENT   the tensor or its file is missing: named
 *   -EBADMSG  the file contradicts itself, the index or config.json
 *   -ENOTSUP  its dtype
 *   -EIO, -EACCES, -ENOMEM
 */
int afd__model_tensor(const struct afd_model *model, int32_t layer, int32_t kind,
		      struct afd__tensor *out);

/* The same for one expert of a routed layer: a tensor of its own, or a slice of a fused one. */
int afd__model_expert(const struct afd_model *model, int32_t layer, uint32_t expert, int32_t kind,
		      struct afd__tensor *out);

/* The scales of K and V in an fp8 cache: the checkpoint's, else 1. -EBADMSG when one is not a
 * positive number. */
int afd__model_kv_scales(const struct afd_model *model, int32_t layer, float *k_scale,
			 float *v_scale);

/* After a tensor was packed: its mapped pages need not count as ours any more. They come back from
 * the file when touched. */
void afd__model_release(const struct afd__tensor *tensor);

/* The dtype of embed_tokens; the config's when its file is missing; 0 when nobody says. */
int32_t afd__model_dtype(const struct afd_model *model);

/* ---- inside lib/model ---- */

/* arch.c: from the text of config.json. On success the caller ends it with _free. */
int afd__arch_read(struct afd__arch *arch, struct afd_context *ctx, const char *text,
		   size_t n_bytes);
void afd__arch_free(struct afd__arch *arch); /* also of a zeroed one */

/* slots.c: every tensor that a role needs, in the order of use, and where the checkpoint (NULL:
 * none) has it. */
int afd__slots_create(struct afd_model *model);
void afd__slots_free(struct afd_model *model);
/* NULL when the architecture has none there. Of an expert by its number, else -1. */
const struct afd__slot *afd__slot_find(const struct afd_model *model, int32_t layer, int32_t expert,
				       int32_t kind);
const char *afd__size_name(uint8_t size);
/* For an error: every name that was looked for. */
void afd__slot_spellings(const struct afd__slot *slot, char *text, size_t capacity);

/* roles.c: the whole tensor of the checkpoint behind a slot, its shape, dtype and scales checked;
 * with_data maps it. */
int afd__slot_stored(const struct afd_model *model, const struct afd__slot *slot, bool with_data,
		     struct afd__tensor *out);
/* The slot's own part of it. */
int afd__slot_tensor(const struct afd_model *model, const struct afd__slot *slot, bool with_data,
		     struct afd__tensor *out);
/* A slot whose tensor is another slot's: the head of a tied model. */
bool afd__slot_is_shared(const struct afd_model *model, const struct afd__slot *slot);

#endif
