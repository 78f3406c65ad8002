/* SPDX-License-Identifier: Apache-2.0 */
/* Descriptors that cross a socket: all that were sent come, or none stays open and the text says
 * whose fault it is. */
#include <stdarg.h>
#include <setjmp.h>
#include <stddef.h>
#include <cmocka.h>

#include <errno.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "../../include/afd/context.h"
#include "../../lib/transport/socket.h"

static int pair[2];

static int begin(void **state)
{
	return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, pair);
}

static int end(void **state)
{
	close(pair[0]);
	close(pair[1]);
	return 0;
}

static int next_fd(void)
{
	int fd = dup(pair[0]);

	assert_true(fd >= 0);
	close(fd);
	return fd;
}

static void too_many_open_files_are_said_and_none_stays(void **state)
{
	struct rlimit was, less;
	char byte = 'x';
	size_t bytes;
	int fds[2], free_fd = next_fd(), rc;

	assert_int_equal(afd__socket_send_fds(pair[0], &byte, 1, pair, 2), 1);
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &was), 0);
	less = (struct rlimit){ (rlim_t)free_fd + 1, was.rlim_max };
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &less), 0);
	rc = afd__socket_receive_fds(pair[1], &byte, 1, &bytes, fds, 2);
	assert_int_equal(setrlimit(RLIMIT_NOFILE, &was), 0);
	assert_int_equal(rc, -EIO);
	assert_non_null(strstr(afd_last_error(), "1 of 2 descriptors of the peer came: too many open files"));
	assert_int_equal(next_fd(), free_fd);
}

static void fewer_descriptors_than_must_come_are_the_peers_fault(void **state)
{
	int fds[2], free_fd = next_fd();
	char byte = 'x';
	size_t bytes;

	assert_int_equal(afd__socket_send_fds(pair[0], &byte, 1, pair, 1), 1);
	assert_int_equal(
		afd__socket_receive_fds(pair[1], &byte, 1, &bytes, fds, 2), -EPROTO);
	assert_non_null(strstr(afd_last_error(), "1 descriptors came, must have 2"));
	assert_int_equal(next_fd(), free_fd);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_setup_teardown(
			too_many_open_files_are_said_and_none_stays, begin, end),
		cmocka_unit_test_setup_teardown(
			fewer_descriptors_than_must_come_are_the_peers_fault, begin, end),
	};
	return cmocka_run_group_tests(tests, NULL, NULL);
}
