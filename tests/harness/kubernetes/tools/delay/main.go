// Holds packets for a while: `delay QUEUE DELAY_MS JITTER_MS`. An iptables rule sends them to NFQUEUE number QUEUE; each
// goes on after DELAY_MS, give or take JITTER_MS, in the order in which they came. For kernels without tc's netem.
package main

import (
	"context"
	"log"
	"math/rand/v2"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/florianl/go-nfqueue/v2"
	"github.com/mdlayher/netlink"
)

// About what a slow line of 1 Gbit/s holds in half a second; beyond it the kernel drops, as a line does.
const capacity = 1 << 15

type packet struct {
	id  uint32
	due time.Time
}

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: delay QUEUE DELAY_MS JITTER_MS")
	}
	var numbers [3]int
	for at, text := range os.Args[1:] {
		number, err := strconv.ParseUint(text, 10, 16)
		if err != nil {
			log.Fatalf("%q is no number from 0 to 65535", text)
		}
		numbers[at] = int(number)
	}
	delay, jitter := time.Duration(numbers[1])*time.Millisecond, time.Duration(numbers[2])*time.Millisecond

	queue, err := nfqueue.Open(&nfqueue.Config{
		NfQueue:     uint16(numbers[0]),
		MaxQueueLen: capacity,
		Copymode:    nfqueue.NfQnlCopyMeta,
		// Large segments stay whole.
		Flags: nfqueue.NfQaCfgFlagGSO,
	})
	if err != nil {
		log.Fatalf("NFQUEUE cannot be opened: %v", err)
	}
	defer queue.Close()
	if err := queue.SetOption(netlink.NoENOBUFS, true); err != nil {
		log.Fatalf("NFQUEUE cannot be set up: %v", err)
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	held := make(chan packet, capacity)
	hold := func(attribute nfqueue.Attribute) int {
		wait := delay + time.Duration((2*rand.Float64()-1)*float64(jitter))
		held <- packet{*attribute.PacketID, time.Now().Add(wait)}
		return 0
	}
	report := func(err error) int {
		log.Printf("a packet was not read: %v", err)
		return 0
	}
	if err := queue.RegisterWithErrorFunc(ctx, hold, report); err != nil {
		log.Fatalf("NFQUEUE cannot be read: %v", err)
	}
	for {
		select {
		case <-ctx.Done():
			return
		case next := <-held:
			time.Sleep(time.Until(next.due))
			if err := queue.SetVerdict(next.id, nfqueue.NfAccept); err != nil {
				log.Printf("a packet was lost: %v", err)
			}
		}
	}
}
