/* Four threads that nap, and a fifth that has the process execute itself again within two milliseconds, for ever. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static char **arguments;
static int generation;

static void *nap(void *unused)
{
	for (;;)
		usleep(200);
}

static void *again(void *unused)
{
	char number[16];
	char *next[] = {arguments[0], arguments[1], number, NULL};

	usleep(rand() % 2000);
	snprintf(number, sizeof number, "%d", generation + 1);
	execv("/proc/self/exe", next);
	_exit(9);
}

int main(int n, char **v)
{
	pthread_t t;

	arguments = v;
	generation = n > 2 ? atoi(v[2]) : 0;
	srand(getpid() * 31 + generation);

	int f = open(v[1], O_WRONLY | O_CREAT | O_CLOEXEC, 0600);

	if (f < 0 || pwrite(f, &generation, sizeof generation, 0) != sizeof generation)
		return 8;
	close(f);
	for (int i = 0; i < 4; i++)
		pthread_create(&t, 0, nap, 0);
	pthread_create(&t, 0, again, 0);
	pause();
}
