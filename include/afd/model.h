/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The model: an opened checkpoint as Hugging Face publishes it, or the same from a host's memory.
 * It says what the architecture is and which tensors each role needs. Cheap to open: no weight is
 * read until a stage is made, and a file is mapped only when a tensor in it is needed, so a role
 * starts although the files of the other role are missing.
 *
 *     afd_model_open(&model, ctx, "Qwen3-0.6B", NULL);
 *     struct afd_contract contract = { .size = sizeof contract };
 *     afd_model_contract(model, &contract);
 *
 * Supported: Qwen3, Qwen3-MoE and AFMoE; of the DeepSeek-V3 family the FFN; f32, f16, bf16, and
 * e4m3 with scales of 128 x 128 blocks. docs/models.md lists every key and tensor.
 * An open checkpoint must not be truncated: its files are mapped.
 */
#ifndef AFD_MODEL_H
#define AFD_MODEL_H

#include "context.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct afd_model afd_model;

enum afd_role {
	AFD_ROLE_ATTENTION = 1, /* embedding, all norms, attention, LM head */
	AFD_ROLE_FFN = 2,
};

/* How stages hold the weights of this model. */
enum afd_weights {
	AFD_WEIGHTS_PACKED = 1,   /* the default: copied into the layout that the device likes
	                             best */
	AFD_WEIGHTS_IN_PLACE = 2, /* used where they are, mapped or lent; bits may differ from
	                             packed ones */
};

/* ---- what both roles agree on ---- */

enum afd_ffn_kind {
	AFD_FFN_DENSE = 1,
	AFD_FFN_MOE = 2, /* routed: each row goes to the top_k experts that a router picks for it */
};

enum afd_activation {
	AFD_ACTIVATION_SILU = 1, /* the default: silu(gate) * up */
};

enum afd_router {
	AFD_ROUTER_NONE = 1,    /* the default: no layer has experts */
	AFD_ROUTER_SOFTMAX = 2, /* shares of all experts */
	AFD_ROUTER_SIGMOID = 3, /* each expert for itself */
};

/*
 * What attention and FFN must agree on; the handshake compares a digest of it. Filled from a model,
 * or by a host that has none: hidden_size and n_layers are enough for dense layers. Widths of the
 * FFN are not part of it: attention never sees them, and a shard or a host's compute function holds
 * them as it likes.
 */
struct afd_contract {
	size_t size;
	uint32_t hidden_size;     /* numbers in a row, 1 .. 65536 */
	uint32_t n_layers;        /* 1 .. 1024 */
	const uint8_t *ffn_kinds; /* [n_layers] enum afd_ffn_kind; NULL: all dense. From a model:
	                             lives as long as it */
	uint32_t n_experts;       /* of a routed layer; 0 without experts */
	uint32_t top_k;           /* experts of one row; 0 without experts */
	int32_t router;           /* enum afd_router */
	int32_t activation;       /* enum afd_activation */
	int32_t dtype; /* enum afd_dtype: what wire and KV dtypes of 0 stand for; 0 means
			  AFD_DTYPE_F32. Not compared */
	int32_t shared_experts; /* 1: in routed layers each row also passes shared experts, of which
				   every shard has a part; 0: rows need only the shards that hold
				   their experts */
};

/* ---- open ---- */

/* A tensor in the host's memory, under its Hugging Face name. Rows of shape[1] numbers follow each
 * other without a gap. */
struct afd_tensor {
	const char *name;      /* "model.layers.0.mlp.up_proj.weight" */
	const uint64_t *shape; /* [n_dims] */
	const void *data;      /* lent until the model is closed; aligned to 4 bytes */
	uint32_t n_dims;       /* 1 .. 4 */
	int32_t dtype; /* enum afd_dtype; of AFD_DTYPE_FP8 the scales are a tensor of their own,
			  NAME_scale_inv */
};

struct afd_model_params {
	size_t size;
	int32_t weights;                  /* enum afd_weights; 0 means packed */
	uint32_t n_tensors;
	const char *config_json;          /* the text of a config.json; with tensors, instead of a
	                                     directory */
	const struct afd_tensor *tensors; /* [n_tensors]; those of one role are enough for its
	                                     stage */
	size_t tensor_bytes;              /* sizeof(struct afd_tensor) */
};

/*
 * Opens the checkpoint in directory dir: config.json, and model.safetensors or
 * model.safetensors.index.json with the files that it names. With dir NULL the model is what
 * params->config_json and ->tensors say; the text and the names are copied, shapes too, the data is
 * borrowed.
 *
 *   -ENOENT   no such directory, no config.json, neither model.safetensors nor an index
 *   -EBADMSG  a file contradicts itself: JSON, a header that lies about its file, a tensor that
 *             stands twice, a number of the wrong type, a size that is absurd. The text names file,
 *             key, value and limit
 *   -ENOTSUP  understood, but not supported: the key, its value, and what is supported
 *   -EINVAL   dir and config_json are both given or both missing; a lent tensor is malformed
 *   -EACCES, -EIO   a file cannot be read
 *   -E2BIG, -ENOMEM
 */
AFD_API int afd_model_open(afd_model **out, afd_context *ctx, const char *dir,
			   const struct afd_model_params *params);
AFD_API void afd_model_close(afd_model *model);

/* Fills what both roles agree on. dtype is that of embed_tokens, or what the config says when its
 * file is missing. */
AFD_API int afd_model_contract(const afd_model *model, struct afd_contract *contract);

/* ---- what is in it; strings live as long as the model ---- */

struct afd_model_info {
	size_t size;
	const char *architecture; /* "Qwen3ForCausalLM" */
	uint32_t n_layers;
	uint32_t hidden_size;
	uint32_t n_heads;         /* query heads */
	uint32_t n_kv_heads;
	uint32_t head_dim;        /* not hidden_size / n_heads in general */
	uint32_t intermediate_size; /* width of a dense FFN layer; 0: there is none */
	uint32_t vocab_size;
	uint32_t max_position_embeddings; /* 0: the config does not say. No limit: positions beyond
	                                     it are computed */
	int32_t dtype;            /* of embed_tokens, or what the config says when its file is
	                             missing; 0: unknown */
	int32_t tied_head;        /* 1: the LM head is embed_tokens; 0: it is lm_head.weight */
	uint32_t n_full_layers;   /* layers by kind: attention to all positions, */
	uint32_t n_sliding_layers; /* or to the last sliding_window of them */
	uint32_t sliding_window;  /* 0: none */
	uint32_t n_dense_layers;  /* FFN without experts, */
	uint32_t n_moe_layers;    /* and with */
	uint32_t n_tensors;       /* that the roles need, for afd_model_tensor() */
	uint64_t kv_bytes_per_token; /* K and V of all layers in `dtype` (2 bytes a number when
					unknown) */
	uint32_t n_experts;       /* of a routed layer; these four 0 when there is none */
	uint32_t top_k;           /* experts of one row */
	uint32_t expert_size;     /* width of one expert */
	uint32_t shared_size;     /* width of the shared experts together; 0: none */
	int32_t router;           /* enum afd_router */
	int32_t ffn_only; /* 1: the attention of this family is not computed, and what is known of
			     it is 0 */
};
AFD_API int afd_model_info(const afd_model *model, struct afd_model_info *info);

/* What one role needs. */
struct afd_role_info {
	size_t size;
	uint64_t n_tensors; /* scales are tensors, too; a fused one counts once */
	uint64_t bytes;     /* as stored */
};
/* Routers count to the FFN, which always loads them. -ENOENT: a tensor of that role, or the file
 * that holds it, is missing: named. -EINVAL: no such role. -ENOTSUP: the attention of a family of
 * which only the FFN is supported. */
AFD_API int afd_model_role(const afd_model *model, int32_t role, struct afd_role_info *info);

/*
 * A rank's part of a role. Shard i of n owns floor(i N / n) .. floor((i+1) N / n) of N experts or
 * columns, for any n <= N.
 * FFN: routed experts over ep, the width of each over tp; dense layers and shared experts by width
 * over all tp * ep ranks. Attention: query heads with their KV heads over tp, KV heads copied where
 * there are more ranks than KV heads.
 */
struct afd_shard {
	uint32_t tp, n_tp; /* tensor-parallel index and ranks; n 0 means 1 */
	uint32_t ep, n_ep; /* expert-parallel ones; FFN only */
};

struct afd_shard_params {
	size_t size;
	int32_t role;          /* enum afd_role */
	int32_t gate;          /* enum afd_gate (transport.h): on the attention side attention holds
	                          the routers, too; 0 means that */
	struct afd_shard shard;
	uint32_t first_layer;  /* of an FFN that holds some layers only */
	uint32_t n_layers;     /* 0: up to the last one */
};
/*
 * What a stage with that shard holds: the tensors that it reads of, and the bytes of its parts of
 * them, as stored. Embedding, head, norms and routers are whole on every rank that has them; of
 * e4m3 a rank holds the scales of all blocks that it touches.
 * Errors as afd_model_role(); -EINVAL: no such shard.
 */
AFD_API int afd_model_shard(const afd_model *model, const struct afd_shard_params *params,
			    struct afd_role_info *info);

/* One tensor that a role needs. */
struct afd_tensor_info {
	size_t size;
	const char *name;
	const char *file;  /* its name in the directory; NULL: lent by the host */
	int32_t role;      /* enum afd_role; routers: AFD_ROLE_FFN */
	int32_t layer;     /* -1: of none */
	int32_t dtype;     /* enum afd_dtype */
	uint32_t n_dims;
	uint64_t shape[4]; /* [n_dims] */
	uint64_t bytes;
};
/* The tensor with this index, 0 .. n_tensors-1, in the order of use. Tensors that no role needs are
 * not listed.
 * -EINVAL beyond n_tensors; -ENOENT, -EBADMSG, -ENOTSUP as a stage would see it. */
AFD_API int afd_model_tensor(const afd_model *model, uint32_t index, struct afd_tensor_info *info);

#ifdef __cplusplus
}
#endif

#endif
