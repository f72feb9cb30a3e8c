import java.io.FileWriter;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Random;
import java.util.concurrent.ArrayBlockingQueue;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;

/** The JVM at work: compiled code, many threads, locks, timers and a busy garbage collector. JavaWork OUT */
public class JavaWork {
    static final List<String> errors = new ArrayList<>();
    static final AtomicLong work = new AtomicLong(), ticks = new AtomicLong(), handed = new AtomicLong();
    static final ConcurrentHashMap<Long, String> common = new ConcurrentHashMap<>();

    static void check(boolean condition, String text) {
        synchronized (errors) {
            if (!condition && errors.size() < 16)
                errors.add(text.replace('"', '?').replace('\\', '?'));
        }
    }

    static long mix(long x) {
        x = (x ^ x >>> 32) * 0xd6e8feb86659fd93L;
        return x ^ x >>> 29;
    }

    /** Arrays and maps with sums beside them; what falls out of them is garbage. */
    static void worker(int me) {
        Random random = new Random(me);
        HashMap<Integer, long[]> map = new HashMap<>();
        long sum = 0;
        double x = Math.PI * (me + 1);
        for (int n = 0;; n++) {
            long[] page = new long[256];
            for (int i = 0; i < page.length; i++)
                page[i] = mix(n * 256L + i + me);
            long[] old = map.put(n % 2000, page);
            sum += page[7];
            if (old != null) {
                int was = n - 2000;
                sum -= old[7];
                for (int i = 0; i < old.length; i += 17)
                    check(old[i] == mix(was * 256L + i + me), "worker " + me + ": array " + was + " is wrong");
            }
            x = Math.sqrt(x * x);
            check(Math.abs(x - Math.PI * (me + 1)) < 1e-9, "worker " + me + ": arithmetic is wrong");
            common.put((long) me << 32 | random.nextInt(5000), "text " + me);
            if (n % 500 == 0) {
                long total = 0;
                for (long[] p : map.values())
                    total += p[7];
                check(total == sum, "worker " + me + ": the sum is wrong");
                try {
                    Thread.sleep(5);
                } catch (InterruptedException e) {
                    check(false, "interrupted by nothing");
                }
            }
            work.incrementAndGet();
        }
    }

    static void hand(ArrayBlockingQueue<Long> from, ArrayBlockingQueue<Long> to, boolean first) {
        try {
            long expected = first ? 0 : 1;
            if (first)
                to.put(1L);
            for (;;) {
                long token = from.take();
                expected = first ? expected + 2 : expected;
                check(token == expected, "token " + token + ", not " + expected);
                expected = first ? expected : expected + 2;
                handed.incrementAndGet();
                Thread.sleep(1);
                to.put(token + 1);
            }
        } catch (InterruptedException e) {
            check(false, "interrupted by nothing");
        }
    }

    static Thread daemon(Runnable r) {
        Thread t = new Thread(r);
        t.setDaemon(true);
        t.start();
        return t;
    }

    public static void main(String[] args) throws Exception {
        ArrayBlockingQueue<Long> a = new ArrayBlockingQueue<>(1), b = new ArrayBlockingQueue<>(1);
        daemon(() -> hand(a, b, true));
        daemon(() -> hand(b, a, false));
        for (int i = 0; i < 6; i++) {
            int me = i;
            daemon(() -> worker(me));
        }
        ScheduledExecutorService timer = Executors.newScheduledThreadPool(1);
        timer.scheduleAtFixedRate(ticks::incrementAndGet, 10, 10, TimeUnit.MILLISECONDS);
        try (FileWriter out = new FileWriter(args[0], true)) {
            long last = System.nanoTime();
            for (int n = 0;; n++) {
                Thread.sleep(200);
                check(System.nanoTime() > last, "the monotonic clock went back");
                last = System.nanoTime();
                for (var e : common.entrySet())
                    check(e.getValue().equals("text " + (e.getKey() >> 32)), "the common map is wrong");
                String all;
                synchronized (errors) {
                    all = errors.isEmpty() ? "" : "\"" + String.join("\",\"", errors) + "\"";
                }
                out.write(String.format("{\"n\":%d,\"ok\":%b,\"errors\":[%s],\"pid\":%d,\"work\":%d,\"ticks\":%d,\"handed\":%d}%n", n,
                        all.isEmpty(), all, ProcessHandle.current().pid(), work.get(), ticks.get(), handed.get()));
                out.flush();
            }
        }
    }
}
