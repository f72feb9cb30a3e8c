#define _GNU_SOURCE
#include "reaper.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { EVERY_NS = 10000000 };

#define SIGNAL (SIGRTMIN + 7)

/* What this thread's signal looks after; read in the handler only while the thread itself is in a call. */
static _Thread_local const int32_t *volatile watched;
static _Thread_local volatile uint64_t watched_n;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static void take_note(int sig)
{
	int saved = errno;

	for (uint64_t i = 0; i < watched_n; i++) {
		siginfo_t now = {0};

		/* Only looked at first: a stop is for somebody else to wait for. */
		if (waitid(P_PID, watched[i], &now, WEXITED | WNOHANG | WNOWAIT | __WALL) || !now.si_pid)
			continue;
		if (now.si_code == CLD_EXITED || now.si_code == CLD_KILLED || now.si_code == CLD_DUMPED)
			waitpid(watched[i], NULL, WNOHANG | __WALL);
	}
	errno = saved;
}

/* For good: a timer of another thread may go off at any moment. */
static void install(void)
{
	struct sigaction action = {.sa_handler = take_note, .sa_flags = SA_RESTART};

	sigemptyset(&action.sa_mask);
	sigaction(SIGNAL, &action, NULL);
}

static void arm(lm_reaper *r)
{
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGNAL};
	struct itimerspec every = {{0, EVERY_NS}, {0, EVERY_NS}};
	sigset_t ours;

	pthread_once(&installed, install);
	sigemptyset(&ours);
	sigaddset(&ours, SIGNAL);
	pthread_sigmask(SIG_UNBLOCK, &ours, NULL);
	event._sigev_un._tid = gettid();
	/* Without a timer all is as it would be without this: only an execve at the wrong moment is not survived. */
	if (timer_create(CLOCK_MONOTONIC, &event, &r->timer))
		return;
	r->armed = true;
	timer_settime(r->timer, 0, &every, NULL);
}

void lm_reaper_watch(lm_reaper *r, const int32_t *tids, uint64_t n)
{
	watched = tids;
	watched_n = n;
	if (!r->armed)
		arm(r);
}

void lm_reaper_stop(lm_reaper *r)
{
	watched_n = 0;
	if (r->armed)
		timer_delete(r->timer);
	r->armed = false;
}
