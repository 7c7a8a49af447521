/* SPDX-License-Identifier: GPL-2.0-or-later */
#include <stdio.h>
#include <stdlib.h>

/*
 * Whether allocations fail, if FAIL is set. Not when files are closed at the end: that needs memory
 * to tell the host, which would take the number of the file for used ever after.
 */
static void let_fail(const char *yes)
{
	static FILE *file;

	if (!getenv("FAIL"))
		return;
	if (!file)
		file = fopen("/proc/self/make-it-fail", "w");
	if (!file || fputs(yes, file) < 0 || fflush(file)) {
		perror("make-it-fail");
		exit(1);
	}
}
