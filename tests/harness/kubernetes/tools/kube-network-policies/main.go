// The network policies of one node, judged by sigs.k8s.io/kube-network-policies. Its own main knows no kubeconfig file,
// as it runs in a pod; ours stands outside the cluster. Owns the flags and nothing else. Which packets come to the queue
// is the node's rule: the library's own needs nft_queue, which a kernel may lack, and says so in the log where it does.
package main

import (
	"context"
	"flag"
	"os/signal"
	"syscall"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
	"sigs.k8s.io/kube-network-policies/pkg/networkpolicy"
)

func main() {
	klog.InitFlags(nil)
	kubeconfig := flag.String("kubeconfig", "", "file that names the API server")
	node := flag.String("hostname-override", "", "name of the node")
	queue := flag.Int("nfqueue-id", 100, "number of the queue of packets")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()

	config, err := clientcmd.BuildConfigFromFlags("", *kubeconfig)
	if err != nil {
		klog.Fatal(err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		klog.Fatal(err)
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	controller, err := networkpolicy.NewController(
		client,
		factory.Networking().V1().NetworkPolicies(),
		factory.Core().V1().Namespaces(),
		factory.Core().V1().Pods(),
		nil, nil, nil, nil,
		// NRI stays on, though containerd before 1.7 has none: the library does without, and crashes where it is off.
		networkpolicy.Config{QueueID: *queue, NodeName: *node},
	)
	if err != nil {
		klog.Fatal(err)
	}
	factory.Start(ctx.Done())
	if err := controller.Run(ctx); err != nil {
		klog.Fatal(err)
	}
}
