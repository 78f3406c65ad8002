/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The router: logits by one product, then scores, the best of them, and their weights. It knows no
 * stage. Called by routed.c, and by the attention stage where that routes.
 */
#include "choice.h"

int afd__choose_experts(struct afd__queue *q, const struct afd__choice *choice)
{
	const struct afd__router *router = &choice->arch->router;
	const struct afd__product_args product = {
		.x = choice->x,
		.x_stride = choice->router.k,
		.w = choice->router,
		.y = choice->logits,
		.y_stride = choice->arch->n_experts,
		.n_rows = choice->n_rows,
	};
	const struct afd__route_args route = {
		.logits = choice->logits,
		.bias = choice->bias,
		.ids = choice->ids,
		.weights = choice->weights,
		.n_rows = choice->n_rows,
		.n_experts = choice->arch->n_experts,
		.top_k = choice->arch->top_k,
		.n_groups = router->n_groups,
		.top_groups = router->top_groups,
		.score = router->score,
		.normalize = router->normalize,
		.epsilon = router->epsilon,
		.scale = router->scale,
	};
	int rc = afd__product(q, &product);

	return rc ? rc : afd__route(q, &route);
}
